"""Settings of the block probe."""

from pydantic import Field

from stages.config import Section


class ProbeConfig(Section):
    """The block probe: which block's tokens tell the teacher's Local Gram Flow, before training."""

    blocks: tuple[int, ...] = ()
    """Indices of the blocks to probe, from 0; [] is all. More can be added to the same folder."""
    timesteps: tuple[int, ...] = (100, 300, 500, 700, 900)
    """Timesteps at which each clip is read."""
    clips: int = Field(default=16, ge=1)
    """Clips that the linear maps are fitted on; 16 is usual."""
    held_out: int = Field(default=8, ge=1)
    """Further clips that agreement is measured on; 8 is usual, and intervals need 5."""
    fit_steps: int = Field(default=300, ge=1)
    """Steps of fitting each block's linear map, of one clip at one timestep each; 300 is usual."""
    fit_learning_rate: float = Field(default=3e-3, gt=0)
    """Initial learning rate of the fit; it decays to zero. 3e-3 is usual."""
