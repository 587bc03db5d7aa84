"""Runs `megatron-rl select`: samples from every candidate, measures its policy, chooses one, and links to it."""

import asyncio
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_rl.config.selection import SelectConfig
from megatron_rl.data.chat import load_tokenizer
from megatron_rl.data.fitting import Limit, rendered_prompts
from megatron_rl.data.mixture import load_prompts
from megatron_rl.data.prompt_tokens import PromptTokens
from megatron_rl.data.prompts import Prompt
from megatron_rl.errors import Fault
from megatron_rl.families import load_architecture
from megatron_rl.files import link_directory, write_whole
from megatron_rl.locks import sole_writer
from megatron_rl.rollout.append_log import find_groups, told_of_resume
from megatron_rl.rollout.sample import check_claim, claim, sample_questions, sampling_settings
from megatron_rl.rollout.sampler import Question
from megatron_rl.selection.candidates import Candidate, find_candidates
from megatron_rl.selection.choice import Measured, check_preference, choose, is_in, straddled_ends
from megatron_rl.selection.measure import measure
from megatron_rl.selection.report import markdown, show, verdict

log = logging.getLogger(__name__)

_REMEDY = "set run_dir to a new folder"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """Holds one candidate's part. path: of its responses. settings: what they depend on. done: positions in the
    file."""

    candidate: Candidate
    path: Path
    tokenizer: Any
    input_ids: PromptTokens
    settings: dict[str, Any]
    done: frozenset[int]


def run_selection(config: SelectConfig, resume: bool) -> int:
    """Run the selection and leave everything in `config.run_dir`. Returns the exit code.

    Raise ValueError for what can be known to fail before a server starts, and when no candidate is within a band that
    is required; Fault when they are to be chosen by accuracy and too many responses could not be judged.
    """
    candidates = find_candidates(config.candidates)
    check_preference(candidates, config.prefer)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    with sole_writer(config.run_dir, _REMEDY):
        return _run(config, candidates, resume)


def _run(config: SelectConfig, candidates: Sequence[Candidate], resume: bool) -> int:
    _check_link(config.run_dir / "chosen")
    stream, _ = load_prompts(config, load_tokenizer(candidates[0].path))
    prompts = _distinct(stream.take(0, config.prompts)[0], len(stream.rows))
    jobs = [_job(config, candidate, prompts, stream.digest) for candidate in candidates]
    _check_same_tokens(jobs)
    _check_unfinished(jobs, config, resume)
    with told_of_resume(config.run_dir, [job.path for job in jobs]):
        asyncio.run(_sample(config, jobs, prompts))
    _conclude(config, [measure(job.candidate, job.path, config.prompts) for job in jobs])
    return 0


def _distinct(prompts: list[Prompt], num_prompts: int) -> list[Prompt]:
    """Return the prompts. Raise ValueError where one comes twice, since intervals count prompts: that happens where the
    order begins a file's next epoch."""
    distinct = {prompt.id for prompt in prompts}
    if len(distinct) < len(prompts):
        raise ValueError(
            f"the first {len(prompts)} prompts of the order of data.train are {len(distinct)} different ones, of "
            f"{num_prompts} in all; lower prompts, or add data"
        )
    return prompts


def _job(config: SelectConfig, candidate: Candidate, prompts: Sequence[Prompt], digest: str) -> _Job:
    path = config.run_dir / f"{candidate.name}.jsonl"
    tokenizer = load_tokenizer(candidate.path)
    settings = sampling_settings(config, candidate.path, digest)
    check_claim(path, settings, _REMEDY)
    done, _ = find_groups(path, config.rollout.samples_per_prompt, _REMEDY)
    limit = Limit(tokens=config.rollout.max_prompt_tokens, key="rollout.max_prompt_tokens")
    return _Job(
        candidate=candidate,
        path=path,
        tokenizer=tokenizer,
        input_ids=rendered_prompts(
            prompts, tokenizer, limit, config.data.special_tokens, arguments=config.data.template_arguments
        ),
        settings=settings,
        done=frozenset(done),
    )


def _check_same_tokens(jobs: Sequence[_Job]) -> None:
    """Raise ValueError unless all candidates have the same tokens: nats per token of different tokens are different
    units."""
    first, *others = jobs
    for other in others:
        differs = next((name for name, ids in first.input_ids.items() if other.input_ids[name] != ids), None)
        eos = [load_architecture(job.candidate.path).eos_token_ids for job in (first, other)]
        if differs is not None or eos[0] != eos[1]:
            what = (
                f"prompt {differs} is other tokens" if differs is not None else f"the end tokens are {eos[0]}, {eos[1]}"
            )
            raise ValueError(
                f"candidates {first.candidate.path} and {other.candidate.path} have different tokenizers or chat "
                f"templates ({what}), so their entropies per token do not compare; choose among models of one tokenizer"
            )


def _check_unfinished(jobs: Sequence[_Job], config: SelectConfig, resume: bool) -> None:
    """Raise ValueError where responses are missing and the run may not be resumed. Where nothing is missing there is
    nothing to resume."""
    missing = [job for job in jobs if not job.done.issuperset(range(config.prompts))]
    begun = [job for job in jobs if job.path.exists()]
    if begun and missing and not resume:
        raise ValueError(
            f"{config.run_dir} holds responses, and those of {len(missing)} of {len(jobs)} candidates are not "
            f"complete; add --resume to go on with them, or {_REMEDY}"
        )


async def _sample(config: SelectConfig, jobs: Sequence[_Job], prompts: Sequence[Prompt]) -> None:
    """Sample from one candidate after the other, each with servers of its own."""
    for number, job in enumerate(jobs, start=1):
        done = claim(job.path, job.settings, config.rollout.samples_per_prompt, _REMEDY)
        questions = [
            Question(prompt_id=position, prompt=prompt, input_ids=job.input_ids[prompt.id])
            for position, prompt in enumerate(prompts)
            if position not in done
        ]
        if questions:
            name = job.candidate.name
            log.info("candidate %d of %d, %s: %d prompts", number, len(jobs), name, len(questions))
            await sample_questions(config, job.candidate.path, job.tokenizer, questions, job.path, f"{name}_server")


def _conclude(config: SelectConfig, measured: Sequence[Measured]) -> None:
    """Choose, and leave results.json, results.md, the table on the terminal, and the link `chosen`."""
    _check_rewards(config, measured)
    best, in_band = choose(measured, config.band, config.prefer)
    chosen = None if config.require_band and not in_band else best
    record = {
        "chosen": chosen and chosen.candidate.name,
        "path": chosen and str(chosen.candidate.path),
        "in_band": in_band,
        "band": config.band,
        "prefer": config.prefer,
        "candidates": {one.candidate.name: _record(one, config.band) for one in measured},
    }
    said = verdict(measured, best, in_band, config.band, config.prefer, chosen)
    title = f"{config.run_dir}: {measured[0].num_prompts} prompts x {measured[0].samples_per_prompt} responses"
    link = config.run_dir / "chosen"
    if chosen is None:
        link.unlink(missing_ok=True)  # an earlier choice does not belong to these results
    write_whole(config.run_dir / "results.json", json.dumps(record, indent=1))
    write_whole(config.run_dir / "results.md", markdown(measured, chosen, title, said))
    show(measured, chosen, title, said)
    if chosen is None:
        raise ValueError(
            f"no candidate is within band = [{config.band[0]:g}, {config.band[1]:g}] and require_band is set; add "
            "candidates, widen band, or set require_band = false to take the nearest"
        )
    _check_link(link)  # somebody may have put something there since
    link_directory(chosen.candidate.path, link)


def _record(one: Measured, band: tuple[float, float]) -> dict[str, Any]:
    values = asdict(one)
    del values["candidate"]
    return {
        "path": str(one.candidate.path),
        "in_band": is_in(one.entropy.value, band),
        "straddles": straddled_ends(one.entropy, band),
        **values,
        "response_tokens_mean": one.response_tokens_mean,
        "sft": asdict(one.candidate.sft),
    }


def _check_rewards(config: SelectConfig, measured: Sequence[Measured]) -> None:
    """Check that there are enough verdicts. Entropies stand without them, a choice by accuracy does not."""
    for one in measured:
        if one.error_share > config.reward.max_error_share:
            path = config.run_dir / f"{one.candidate.name}.jsonl"
            message = (
                f"{one.candidate.name}: a share of {one.error_share:.2f} of the responses could not be judged, more "
                f"than reward.max_error_share = {config.reward.max_error_share:g}, and they count as wrong; "
                f'"details" in {path} says why. Remove that file and add --resume to sample it again'
            )
            if config.prefer == "accuracy":
                raise Fault(message)
            log.warning("%s", message)


def _check_link(link: Path) -> None:
    if link.exists() and not link.is_symlink():
        raise ValueError(f"{link} is where the link to the chosen candidate goes; remove it, or {_REMEDY}")
