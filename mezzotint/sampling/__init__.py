"""How to walk from noise to image."""

from mezzotint.sampling.ddim import DDIM
from mezzotint.sampling.dpmpp_2m import DPMpp2M
from mezzotint.sampling.euler import Euler, FlowEuler
from mezzotint.sampling.loop import sample, seeded_noise
from mezzotint.sampling.path import Denoise, Moment, Path, Rng, Sampler, Step
from mezzotint.sampling.spacing import Spacing

KARRAS = Spacing("linspace", ramp="karras")

SAMPLERS: dict[str, Sampler] = {
    "ddim": DDIM(),
    "euler": Euler(),
    "euler_ancestral": Euler(eta=1.0),
    "dpmpp_2m": DPMpp2M(),
    "dpmpp_2m_karras": DPMpp2M(spacing=KARRAS),
    "dpmpp_2m_sde": DPMpp2M(noise=1.0),
    "dpmpp_2m_sde_karras": DPMpp2M(noise=1.0, spacing=KARRAS),
    "flow_euler": FlowEuler(),
}

__all__ = ["SAMPLERS", "Denoise", "Moment", "Path", "Rng", "Sampler", "Spacing", "Step", "sample", "seeded_noise"]
