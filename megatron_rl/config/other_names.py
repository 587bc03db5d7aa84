"""Lists what TRL, slime, verl, prime-rl and other trainers call the keys of this one."""

from collections.abc import Collection

# Other names by our key. A name with a dot includes its section.
_NAMES = {
    "run_dir": "output_dir default_local_dir save save_dir checkpoint_dir ckpt_dir work_dir log_dir "
    "logging_dir tensorboard_dir",
    "seed": "random_seed manual_seed data_seed rollout_seed",
    "model.path": "model_name_or_path model_name hf_checkpoint ref_load load pretrained pretrain partial_pretrain "
    "actor_model_path model.name base_model",
    "model.dtype": "bf16 fp16 torch_dtype precision model_dtype params_dtype",
    "model.recompute": "gradient_checkpointing enable_gradient_checkpointing recompute_granularity "
    "activation_checkpointing ac recompute_method recompute_num_layers",
    "model.attention": "attn attn_implementation flash_attn use_flash_attention attention_backend",
    "data.train": "train_files prompt_data dataset dataset_name dataset_path train_file train_data data_path",
    "data.validation": "val_files eval_dataset validation_files eval_prompt_data val_data",
    "data.system": "system_prompt",
    "data.template_arguments": "chat_template_kwargs apply_chat_template_kwargs",
    "data.too_long": "filter_overlong_prompts truncation filter_overlong",
    "data.batch_tokens": "tokens_per_batch",
    "rollout.prompts_per_step": "rollout_batch_size train_batch_size gen_batch_size batch_size examples_per_step "
    "num_prompts prompts_per_rollout over_sampling_batch_size generation_batch_size",
    "rollout.samples_per_prompt": "num_generations n_samples_per_prompt rollouts_per_example n rollout_n group_size "
    "num_return_sequences num_samples k",
    "rollout.max_response_tokens": "max_completion_length max_response_length rollout_max_response_len max_tokens "
    "max_new_tokens response_length max_completion_tokens generate_max_len max_gen_len",
    "rollout.max_prompt_tokens": "max_prompt_length rollout_max_prompt_len prompt_max_len max_prompt_len",
    "rollout.temperature": "rollout_temperature sampling_temperature",
    "rollout.max_running_requests": "max_num_seqs max_concurrent sglang_server_concurrency max_concurrency "
    "sglang_max_running_requests",
    "rollout.sglang_arguments": "gpu_memory_utilization vllm_gpu_memory_utilization sglang_mem_fraction_static "
    "mem_fraction_static tp_size vllm_tensor_parallel_size rollout_num_gpus_per_engine engine_kwargs",
    "rollout.servers": "num_engines rollout_num_gpus num_servers vllm_num_engines data_parallel_size dp",
    "rollout.engine": "backend rollout_backend use_vllm vllm_mode inference_engine",
    "rollout.urls": "base_url vllm_server_host vllm_server_port vllm_server_base_url sglang_router_ip server_url "
    "rollout_external_engine_addrs",
    "rollout.release_memory": "colocate free_cache_engine vllm_enable_sleep_mode offload_rollout enable_sleep_mode",
    "rollout.partial": "partial_rollout",
    "rollout.agent": "custom_generate_function_path rollout_function_path agent_loop_config_path default_agent_loop "
    "environment_factory",
    "rollout.max_turns": "max_assistant_turns max_tool_calling_iterations",
    "rollout.tool_parser": "tool_call_parser multi_turn.format",
    "rollout.router_replay": "use_rollout_routing_replay routing_replay use_routing_replay router_replay "
    "enable_rollout_routing_replay",
    "rollout.max_restarts": "use_fault_tolerance",
    "rollout.silence_seconds": "rollout_health_check_timeout",
    "rollout.ready_deadline_seconds": "vllm_server_timeout",
    "reward.kind": "rm_type reward_funcs custom_rm_path reward_function reward_fn reward_manager "
    "custom_reward_function rm_url",
    "reward.parts": "reward_weights",
    "reward.overlong_buffer_tokens": "overlong_buffer.len overlong_buffer_len soft_punish_cache",
    "reward.overlong_penalty": "overlong_buffer.penalty_factor penalty_factor",
    "lora.rank": "lora_r lora_rank lora_dim",
    "lora.alpha": "lora_alpha",
    "lora.targets": "lora_target_modules target_modules",
    "optimizer.learning_rate": "lr max_lr actor_lr actor_learning_rate",
    "optimizer.min_learning_rate": "min_lr lr_min",
    "optimizer.schedule": "lr_scheduler_type lr_decay_style lr_scheduler scheduler warmup_style lr_schedule",
    "optimizer.warmup_steps": "lr_warmup_steps lr_warmup_iters num_warmup_steps",
    "optimizer.warmup_share": "warmup_ratio lr_warmup_steps_ratio lr_warmup_fraction warmup_fraction",
    "optimizer.weight_decay": "wd",
    "optimizer.beta1": "adam_beta1 betas1 betas",
    "optimizer.beta2": "adam_beta2 betas2",
    "optimizer.epsilon": "adam_epsilon adam_eps optim.eps optimizer.eps optim.epsilon",
    "optimizer.clip_grad": "max_grad_norm grad_clip max_norm gradient_clipping clip_grad_norm grad_norm_clip",
    "optimizer.offload_fraction": "optimizer_offload optimizer_cpu_offload optimizer_offload_fraction cpu_offload "
    "optimizer_cpu_offload_fraction",
    "parallel.tensor": "tensor_model_parallel_size tensor_parallel_size tensor_parallel tp",
    "parallel.pipeline": "pipeline_model_parallel_size pipeline_parallel_size pp",
    "parallel.virtual_pipeline": "virtual_pipeline_model_parallel_size num_layers_per_virtual_pipeline_stage vpp",
    "parallel.expert": "expert_model_parallel_size expert_parallel_size ep",
    "parallel.expert_tensor": "expert_tensor_parallel_size etp",
    "parallel.context": "context_parallel_size ulysses_sequence_parallel_size cp",
    "moe.load_balance_coefficient": "moe_aux_loss_coeff aux_loss_coef router_aux_loss_coef load_balance_loss_coeff",
    "moe.z_loss_coefficient": "moe_z_loss_coeff z_loss_coef router_z_loss_coef",
    "train.steps": "max_steps num_rollout total_training_steps num_steps num_iterations_total train_iters total_steps "
    "training_steps",
    "train.epochs": "num_train_epochs total_epochs num_epoch num_epochs max_epochs",
    "train.micro_batch_tokens": "max_tokens_per_gpu ppo_max_token_len_per_gpu per_device_train_batch_size seq_len "
    "micro_batch_size ppo_micro_batch_size_per_gpu max_seq_length max_length seq_length max_token_len_per_gpu",
    "train.save_every": "save_steps save_interval save_freq ckpt.interval checkpoint.interval checkpoint_interval "
    "save_strategy",
    "train.keep_last": "save_total_limit max_actor_ckpt_to_keep max_ckpt_to_keep keep_latest_k ckpt.keep",
    "train.keep_best": "metric_for_best_model load_best_model_at_end",
    "train.phase_deadline_seconds": "ddp_timeout distributed_timeout_minutes dist_timeout_seconds",
    "train.validate_every": "test_freq eval_steps eval_interval val_interval eval_every eval_strategy eval.interval",
    "validation.every": "test_freq eval_steps eval_interval val_interval eval_every eval_strategy eval.interval",
    "validation.benchmarks": "val_files eval_dataset validation_files eval_prompt_data val_data",
    "validation.samples": "n_samples_per_eval_prompt val_kwargs.n num_generations_eval",
    "validation.temperature": "eval_temperature val_kwargs.temperature",
    "validation.top_p": "eval_top_p val_kwargs.top_p",
    "tracking.to": "report_to logger loggers wandb use_wandb trackio use_trackio use_tensorboard log_with "
    "logger_backends",
    "tracking.project": "wandb_project project_name trackio_project wandb.project trackio.project",
    "tracking.name": "run_name experiment_name wandb_name wandb_run_name wandb_exp_name exp_name wandb.name",
    "tracking.group": "wandb_group wandb.group",
    "tracking.tags": "wandb_tags wandb.tags",
    "train.offload_while_generating": "offload offload_train param_offload grad_offload",
    "budget.tokens": "gradient_accumulation_steps global_batch_size token_budget token_batch_size",
    "budget.max_staleness": "off_policy_steps max_off_policy_steps staleness",
    "algorithm.name": "adv_estimator advantage_estimator loss_type loss.type policy_loss rl_algorithm loss_mode",
    "algorithm.advantage": "scale_rewards norm_adv_by_std_in_grpo normalize_advantages grpo_std_normalization "
    "disable_grpo_std_normalization custom_advantage_function_path",
    "algorithm.surrogate": "custom_loss_function_path",
    "algorithm.ratio": "importance_sampling_level",
    "algorithm.clip_low": "epsilon clip_ratio clip_ratio_low eps_clip cliprange epsilon_low clip_eps eps_clip_low "
    "clip_range",
    "algorithm.clip_high": "epsilon_high clip_ratio_high eps_clip_high cliprange_high clip_range_high",
    "algorithm.kl_coefficient": "beta kl_coef kl_loss_coef init_kl_coef kl_beta kl_penalty_coef kl_coeff kl_tau",
    "algorithm.kl_estimator": "kl_loss_type kl_penalty kl_type",
    "algorithm.entropy_coefficient": "entropy_coef entropy_coeff entropy_loss_coef ent_coef",
    "algorithm.passes_per_rollout": "num_iterations ppo_epochs num_updates_per_batch",
    "algorithm.optimizer_steps_per_rollout": "ppo_mini_batch_size steps_per_generation num_steps_per_rollout "
    "num_mini_batches",
    "algorithm.dynamic_sampling": "filter_groups dynamic_sampling_filter_path dynamic_filter",
    "algorithm.mask_truncated": "mask_truncated_completions overlong_filtering mask_overlong",
    "algorithm.correction": "use_tis tis vllm_importance_sampling_correction rollout_is rollout_correction "
    "custom_tis_function_path",
    "algorithm.tis_cap": "tis_clip tis_imp_ratio_cap vllm_importance_sampling_cap rollout_is_threshold",
    "distillation.path": "opd_teacher_load teacher_model_name_or_path teacher_model",
    "distillation.coefficient": "opd_kl_coef",
    "sync.bucket_mb": "update_weights_bucket_megabytes update_weight_buffer_size",
    "sync.transport": "weight_broadcast weight_sync update_weight_mode",
    "cluster.nodes": "nnodes num_nodes actor_num_nodes",
    "cluster.gpus_per_node": "n_gpus_per_node num_gpus_per_node actor_num_gpus_per_node",
}
# Settings of other programs that have no key here, and why.
_NONE = {
    **dict.fromkeys(
        ("top_p", "rollout_top_p"),
        "training samples from the whole distribution, since it needs the log-prob of every token; `evaluate` has "
        "rollout.top_p, and [validation] has top_p",
    ),
    **dict.fromkeys(("top_k", "rollout_top_k", "min_p"), "responses are sampled from the whole distribution"),
    "repetition_penalty": "responses are sampled without penalties, from the distribution that is trained",
    **dict.fromkeys(
        ("input_key", "prompt_key", "label_key", "messages_key", "metadata_key", "reward_fn_key"),
        "columns have fixed names: prompt, answer and domain, or messages, and others go into `meta` (docs/data.md); "
        "tools/prepare_data.py renames them",
    ),
    **dict.fromkeys(
        ("shuffle_dataset", "rollout_shuffle"), "rows are always shuffled, in another order for each seed and epoch"
    ),
    "apply_chat_template": "prompts and chats are always rendered by the model's chat template",
    **dict.fromkeys(
        ("max_model_len", "rollout_max_context_len", "vllm_max_model_length"),
        "the context of servers has room for rollout.max_prompt_tokens and rollout.max_response_tokens together",
    ),
    "group_rm": "a service (reward.kind) always gets all responses to a prompt at once, and so does a function of your "
    "own that takes `responses`",
    "loss_agg_mode": "algorithm.name decides what the loss is divided by",
    **dict.fromkeys(
        ("logging_steps", "logging_strategy", "logging_first_step", "log_interval", "log_freq", "log_every"),
        "every step is in metrics.jsonl and goes to each of tracking.to",
    ),
    **dict.fromkeys(
        ("log_completions", "num_completions_to_print", "rollout_data_dir"), "every response is in run_dir/rollouts"
    ),
    **dict.fromkeys(
        ("log_val_generations", "validation_data_dir"), "every response to a benchmark is in run_dir/validation"
    ),
    **dict.fromkeys(("entity", "wandb_entity", "wandb_team"), "wandb takes it from WANDB_ENTITY in the environment"),
    **dict.fromkeys(("wandb_key", "wandb_api_key"), "wandb takes it from `wandb login`, or WANDB_API_KEY"),
    **dict.fromkeys(("wandb_mode", "wandb.offline", "wandb_offline"), "wandb takes it from WANDB_MODE"),
    **dict.fromkeys(
        ("resume_from_checkpoint", "resume_mode", "resume_from_path", "resume_step", "ckpt.resume_step"),
        "`megatron-rl train CONFIG --resume` goes on from the newest checkpoint in run_dir",
    ),
    "val_before_train": "the weights of the start are validated wherever validation.every is set",
    "eval_on_start": "the weights of the start are validated wherever validation.every is set",
    "val_only": "`megatron-rl evaluate` does that",
    "eval_max_response_len": "validation takes rollout.max_response_tokens",
    "push_to_hub": "a run uploads nothing; run_dir/hf is a model directory",
    "hub_model_id": "a run uploads nothing; run_dir/hf is a model directory",
    "use_dynamic_bsz": "micro-batches are always filled by tokens, up to train.micro_batch_tokens",
    "use_dynamic_batch_size": "micro-batches are always filled by tokens, up to train.micro_batch_tokens",
    "use_remove_padding": "sequences are always packed one behind the other",
    "balance_batch": "ranks always get work of about equal cost",
    "critic_warmup": "a response is one action with one reward, so there is no value function",
    "max_async_level": "every step trains on responses to the newest weights, or with rollout.partial on those under "
    "way",
    "async_level": "every step trains on responses to the newest weights, or with rollout.partial on those under way",
    "gamma": "a response is one action with one reward, so nothing is discounted",
    **dict.fromkeys(("lam", "lambd"), "a response is one action with one reward, so there is no value function"),
    **dict.fromkeys(
        ("sync_ref_model", "ref_update_interval", "ref_model_sync_steps"),
        "the reference policy of algorithm.kl_coefficient always has the weights that the run began with",
    ),
    "save_hf": "the last weights are written to run_dir/hf, and `megatron-rl convert` makes such a directory of any "
    "checkpoint",
    "use_kl_loss": "the KL term is there where algorithm.kl_coefficient is above 0",
    "sequence_parallel": "it is on wherever parallel.tensor is above 1",
    "use_peft": "adapters are trained where there is a section [lora]",
    "use_rslora": "[lora] always has its scale, alpha / sqrt(rank)",
    "lora_dropout": "adapters are trained without dropout",
    "pad_token_id": "it is read from the model directory",
    "eos_token_id": "it is read from the model directory",
}
_KEYS: dict[str, list[str]] = {}
for _key, _names in _NAMES.items():
    for _name in _names.split():
        _KEYS.setdefault(_name, []).append(_key)


def keys_called(path: str, known: Collection[str]) -> list[str]:
    """List which of the known keys others call so. path: of an unknown key, with its section."""
    for name in _ways_to_say(path):
        found = [key for key in _KEYS.get(name, ()) if key in known]
        if found:
            return found
    return []


def why_none(path: str) -> str:
    """Say why there is no such key; "" where others have none either."""
    return next((_NONE[name] for name in _ways_to_say(path) if name in _NONE), "")


def names_of(key: str) -> list[str]:
    """List what others call a key of ours."""
    return _NAMES.get(key, "").split()


def _ways_to_say(path: str) -> tuple[str, str]:
    """Return the name with its section, and alone, as Python would have them."""
    parts = path.lower().replace("-", "_").split(".")
    return ".".join(parts[-2:]), parts[-1]
