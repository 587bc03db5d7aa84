"""Accuracy of a model directory on held-out prompts, with a 95 % interval. Needs no trainer."""

import asyncio
import json
import logging
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_rl.config.schema import RlConfig
from megatron_rl.data.chat import load_tokenizer, rendered_prompts
from megatron_rl.data.prompts import read_prompts
from megatron_rl.rollout.sampler import Question
from megatron_rl.rollout.standalone import sampling

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """avg@k over `num_prompts` prompts; `low` and `high` bound the accuracy with 95 % confidence."""

    model: str
    accuracy: float
    low: float
    high: float
    num_prompts: int
    samples_per_prompt: int
    by_kind: dict[str, float]
    response_tokens_mean: float
    seconds: float


def run_evaluation(config: RlConfig, model: Path | None, output: Path | None) -> int:
    """`megatron-rl evaluate`: logs the result, writes it to `output` if given. Returns the exit code."""
    result = asyncio.run(evaluate(config, model or config.model.path))
    log.info(
        "%s: accuracy %.3f (95 %% interval %.3f to %.3f) on %d prompts x %d",
        *(result.model, result.accuracy, result.low, result.high, result.num_prompts, result.samples_per_prompt),
    )
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(asdict(result), indent=1))
    return 0


async def evaluate(config: RlConfig, model: Path) -> Evaluation:
    """Sample every test prompt `evaluate.samples_per_prompt` times at the run's temperature and score."""
    if config.data.test is None:
        raise ValueError("data.test is not set; evaluation needs held-out prompts")
    prompts = read_prompts(config.data.test)[: config.evaluate.prompts]
    if len(prompts) < config.evaluate.prompts:
        raise ValueError(f"{config.data.test} holds {len(prompts)} prompts, evaluate.prompts asks for more")
    tokenizer = load_tokenizer(model)
    input_ids = rendered_prompts(prompts, tokenizer, config.rollout.max_prompt_tokens, config.data.test)
    questions = [Question(prompt_id=i, prompt=p, input_ids=input_ids[p.id]) for i, p in enumerate(prompts)]
    started = time.perf_counter()
    # A seed of its own: evaluation must not repeat the random numbers of training.
    async with sampling(config, model, tokenizer, "evaluate_server", config.seed + 1_000_000_007) as sampler:
        groups = await sampler.sample(questions, 0, config.evaluate.samples_per_prompt)
    scores = [sum(s.reward for s in group.samples) / len(group.samples) for group in groups]
    kinds: dict[str, list[float]] = {}
    for prompt, score in zip(prompts, scores, strict=True):
        kinds.setdefault(str(prompt.meta.get("kind", prompt.domain)), []).append(score)
    lengths = [s.response.num_output_tokens for group in groups for s in group.samples]
    accuracy = sum(scores) / len(scores)
    low, high = wilson_interval(accuracy, len(scores))
    return Evaluation(
        model=str(model),
        accuracy=accuracy,
        low=low,
        high=high,
        num_prompts=len(prompts),
        samples_per_prompt=config.evaluate.samples_per_prompt,
        by_kind={kind: sum(values) / len(values) for kind, values in sorted(kinds.items())},
        response_tokens_mean=sum(lengths) / len(lengths),
        seconds=time.perf_counter() - started,
    )


def wilson_interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a share observed in `count` trials (Wilson score).

    With several samples per prompt the prompts are counted, not the samples: samples of one prompt depend on each
    other, so the interval errs on the wide side.
    """
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (centre - spread) / (1 + z * z / count), (centre + spread) / (1 + z * z / count)
