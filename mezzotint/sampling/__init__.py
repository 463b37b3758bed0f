"""How to walk from noise to image."""

from mezzotint.sampling.ddim import DDIM
from mezzotint.sampling.ddpm import DDPM
from mezzotint.sampling.dpmpp_2m import DPMpp2M
from mezzotint.sampling.euler import Euler, FlowEuler
from mezzotint.sampling.fitted import bounded, fitted, fresh
from mezzotint.sampling.heun import Heun
from mezzotint.sampling.lcm import LCM
from mezzotint.sampling.loop import sample, seeded_noise
from mezzotint.sampling.path import Denoise, Moment, Path, Rng, Sampler, Step
from mezzotint.sampling.spacing import KARRAS, Spacing
from mezzotint.sampling.unipc import UniPC

SAMPLERS: dict[str, Sampler] = {
    "ddpm": DDPM(),
    "ddim": DDIM(),
    "euler": Euler(),
    "euler_ancestral": Euler(eta=1.0),
    "heun": Heun(),
    "dpmpp_2m": DPMpp2M(),
    "dpmpp_2m_karras": DPMpp2M(spacing=KARRAS),
    "dpmpp_2m_sde": DPMpp2M(eta=1.0),
    "dpmpp_2m_sde_karras": DPMpp2M(eta=1.0, spacing=KARRAS),
    "unipc": UniPC(),
    "unipc_karras": UniPC(spacing=KARRAS),
    "lcm": LCM(),
    "flow_euler": FlowEuler(),
}

__all__ = [
    "SAMPLERS",
    "DDIM",
    "DDPM",
    "LCM",
    "DPMpp2M",
    "Denoise",
    "Euler",
    "FlowEuler",
    "Heun",
    "Moment",
    "Path",
    "Rng",
    "Sampler",
    "Spacing",
    "Step",
    "UniPC",
    "bounded",
    "fitted",
    "fresh",
    "sample",
    "seeded_noise",
]
