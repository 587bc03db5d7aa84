"""Defines the section `parallel`."""

from pydantic import Field

from megatron_rl.config.layout import Layout
from megatron_rl.config.section import Positive, Section


class ParallelSection(Section):
    tensor: Positive = Field(default=1, description="tensor parallel size; above 1 sequence parallelism is on")
    pipeline: Positive = Field(
        default=1, description="pipeline parallel size: so many ranks hold a part of the layers each"
    )
    virtual_pipeline: Positive = Field(
        default=1,
        description="parts of the model on each pipeline stage (Megatron's interleaved schedule): more parts, less "
        "idling, more communication. Above 1 it needs parallel.pipeline of at least 3, and a rank runs a multiple of "
        "parallel.pipeline micro-batches, empty ones if need be",
    )
    expert: Positive = Field(
        default=1, description="expert parallel size: so many ranks hold a part of the experts of a layer each"
    )
    expert_tensor: Positive = Field(default=1, description="tensor parallel size within an expert")
    context: Positive = Field(
        default=1,
        description="context parallel size: so many ranks share every sequence, each holds its part of it. Needs local "
        "layers",
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
