"""Defines the section `parallel`."""

from pydantic import Field

from megatron_rl.config.layout import Layout
from megatron_rl.config.section import Positive, Section


class ParallelSection(Section):
    tensor: Positive = Field(default=1, description="Tensor parallel size. Above 1, sequence parallelism is on.")
    pipeline: Positive = Field(
        default=1, description="Pipeline parallel size: the number of ranks that the layers are divided over."
    )
    virtual_pipeline: Positive = Field(
        default=1,
        description="Number of model chunks per pipeline rank (Megatron's interleaved schedule). More chunks cause "
        "less idle time and more communication. Above 1 it needs parallel.pipeline of at least 3, and a rank runs a "
        "multiple of parallel.pipeline micro-batches, empty ones if need be.",
    )
    expert: Positive = Field(
        default=1, description="Expert parallel size: the number of ranks that the experts of a layer are divided over."
    )
    expert_tensor: Positive = Field(default=1, description="Tensor parallel size within one expert.")
    context: Positive = Field(
        default=1,
        description="Context parallel size: the number of ranks that every sequence is divided over. Above 1 it needs "
        "local layers.",
    )

    def layout(self, world_size: int) -> Layout:
        return Layout(
            world_size=world_size,
            tensor=self.tensor,
            pipeline=self.pipeline,
            virtual_pipeline=self.virtual_pipeline,
            expert=self.expert,
            expert_tensor=self.expert_tensor,
            context=self.context,
        )
