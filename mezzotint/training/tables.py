"""The tables of a recipe: every key with its type, its default and what it does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

METHODS = ("full", "vae", "patch-pca", "lora", "dreambooth", "textual-inversion", "controlnet", "lcm")
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A table of the recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Data(Section):
    """What is learned from; paths are relative to where the command runs."""

    folder: str  # a training folder with metadata.jsonl
    validation: str | None = None  # the same for the validation loss
    size: tuple[Positive, Positive]  # width, height in pixels
    channels: Literal[1, 3] = 3
    flips: list[Literal["horizontal", "vertical"]] = []  # off by default: parts whose orientation matters are common
    sampling: Literal["shuffle", "balanced"] = "shuffle"  # balanced: every label as often, whatever its count
    cache: str | None = None  # folder of latent and text caches; by default inside the run folder
    bucket_step: Count = 0  # 0: every image is cut to `size`; else sizes of about its area, sides multiples of this
    bucket_ratio: Annotated[float, Field(ge=1)] = 2.0  # longest side of a bucket against its shortest, at most


class Inpaint(Section):
    """Training to repaint inside a mask."""

    k: Positive | None = None  # mask maps: k*k channels; None: the base's, or 1
    source: Literal["procedural", "file", "both"] = "procedural"  # file: the masks that metadata.jsonl names
    file_share: Share = 0.5  # both: how often an image that has a mask uses it
    dilation: tuple[Count, Count] = (0, 0)  # pixels by which a mask from a file grows, drawn between the two
    full_share: Share = 0.0  # how often the mask is the whole image
    label_overlap: Share = 0.5  # an image with a mask keeps its label where at least this share of it is repainted
    inside_weight: Annotated[float, Field(gt=0)] = 1.0  # weight of the loss inside the mask against outside
    bank: Positive = 2048  # procedural masks drawn once, then reused with mirrorings


class Classes(Section):
    """Class labels; index len(names) is "no class"."""

    names: Annotated[list[str], Field(min_length=1)] | None = None  # None: the base's
    dropout: Share = 0.1  # labels replaced by "no class", which makes guidance possible


class Text(Section):
    """Captions. A model that is trained on reads them with its own encoder; a new one with minilm or a folder's."""

    encoder: str | None = None  # new models: minilm, or the folder of an encoder
    length: Positive = 64  # new models: tokens; longer captions are cut
    dropout: Share = 0.1  # captions replaced by the empty prompt


class Base(Section):
    """The model that is trained on: anything that `generate` takes. Its contract holds for everything not said here."""

    path: str
    prediction: str | None = None  # what a file cannot say (Stable Diffusion 2): epsilon or velocity
    distilled: bool | None = None  # the same (FLUX.2 klein)
    parts: str | None = None  # a folder with what a single file lacks
    train_distilled: bool = False  # the explicit word: training undoes a distillation bit by bit
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of weights that do not train


class Backbone(Section):
    """A new network."""

    name: str
    config: dict[str, Any] = {}


class CodecPart(Section):
    """The autoencoder: a folder, or `model folder/vae`; none means the base's, or pixels for a new model."""

    path: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # that latents are computed in


class Loss(Section):
    """How samples of different noise count (names as in mezzotint.process.weighting), and parts of the picture."""

    weighting: Literal["uniform", "min_snr"] = "uniform"
    gamma: Annotated[float, Field(gt=0)] = 5.0  # min-SNR
    density: Literal["uniform", "logit_normal"] = "uniform"  # of the training times
    mean: float = 0.0  # logit-normal
    deviation: Annotated[float, Field(gt=0)] = 1.0  # logit-normal
    shift: Annotated[float, Field(gt=0)] | Literal["contract", "resolution"] = "contract"  # of a flow's training times
    channel_power: Annotated[float, Field(ge=0)] = 0.0  # 0: channels alike; 1: by their size in the autoencoder's units
    outside: Share = 1.0  # weight of the error outside an image's mask, for images that have one
    guidance: Annotated[float, Field(ge=0)] = 1.0  # the scale that a network which reads one is told
    offset: Annotated[float, Field(ge=0)] = 0.0  # noise offset: deviation of a constant added to each channel's noise
    variance: Annotated[float, Field(ge=0)] = 0.001  # learned variance: weight of its bound (Nichol 2021, eq. 16)


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021)."""

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] | None = None  # scale = alpha / rank; None: the rank, so 1
    stabilised: bool = False  # scale = alpha / sqrt(rank) (Kalajdzievski 2023)
    dora: bool = False  # a magnitude beside the direction (Liu et al. 2024)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of what the adapter reads
    targets: Annotated[list[str], Field(min_length=1)] = ["attention"]  # parts by name, see docs/fine-tuning.md
    text_targets: list[str] = []  # the same in the CLIPs, or in MiniLM; none: text encoders stay as they are
    text_rate: Annotated[float, Field(gt=0)] = 0.5  # learning rate of text encoders against the recipe's
    export: Annotated[list[Literal["diffusers", "peft", "kohya"]], Field(min_length=1)] = ["diffusers", "peft", "kohya"]


class DreamBooth(Section):
    """A subject from a few images, and what keeps its class from being forgotten (Ruiz et al. 2023)."""

    prompt: str | None = None  # of every image of the subject, "a photo of sks dog"; None: its captions
    label: str | None = None  # of every image of the subject, for models with classes
    class_prompt: str | None = None  # of the class, "a photo of a dog": what prior images are drawn with
    class_label: str | None = None
    prior_images: Count = 0  # drawn by the base itself before training; 0: no prior preservation
    prior_folder: str | None = None  # where they are, or are put; by default inside the run folder
    class_folder: str | None = None  # a training folder of real images of the class, in place of drawn ones
    prior_weight: Annotated[float, Field(gt=0)] = 1.0  # of the loss on them
    prior_steps: Positive | None = None
    prior_guidance: Annotated[float, Field(ge=0)] | None = None


class TextualInversion(Section):
    """A new word for a few images (Gal et al. 2022)."""

    word: str  # "<thing>"
    vectors: Positive = 1
    initial: str  # the known word that it starts from
    encoders: list[str] = []  # folders of the text encoders that learn it; none: all. T5 reads letters otherwise
    # prompts with {} for the word; none: the captions, which hold the word
    templates: list[str] = ["a photo of {}"]


class Control(Section):
    """A control network on a base that stays as it is (Zhang et al. 2023)."""

    condition: Literal["mask", "edges", "file"] = "mask"  # file: the picture that metadata.jsonl names as "control"
    start: str | None = None  # a control network to go on from; None: a copy of the base's encoder
    config: dict[str, Any] = {}
    edges: tuple[Share, Share] = (0.1, 0.2)  # the edge filter's low and high threshold


class Lcm(Section):
    """Latent consistency distillation (Luo et al. 2023): few steps with the `lcm` sampler."""

    solver_steps: Annotated[int, Field(ge=2)] = 50  # levels of the teacher's path
    guidance: Annotated[float, Field(ge=0)] | tuple[float, float] | None = None  # that is distilled; None: the base's
    huber: Annotated[float, Field(gt=0)] = 0.001


class Vae(Section):
    """The autoencoder objective: reconstruction + perceptual + adversarial + KL, or the codebook's loss."""

    name: str = "kl_vae"
    config: dict[str, Any] = {}
    start: str | None = None  # to go on from: a model, folder or single file of any family, or an autoencoder's folder
    trains: Literal["all", "decoder"] | None = None  # None: all of a new one, of a start the decoder alone, which keeps
    # every latent as it is, and so the backbones and LoRAs that were trained on them
    reconstruction: Literal["l1", "l2"] = "l1"
    gradient: Annotated[float, Field(ge=0)] = 0.0  # weight of the same distance between image gradients: edges, cracks
    perceptual: Annotated[float, Field(ge=0)] = 1.0
    adversarial: Annotated[float, Field(ge=0)] = 0.5
    discriminator_start: Count = 0  # step from which the discriminator plays
    discriminator_channels: Positive = 64
    discriminator_layers: Positive = 3
    discriminator_rate: Annotated[float, Field(gt=0)] = 1.0  # its learning rate relative to the autoencoder's
    kl: Annotated[float, Field(ge=0)] = 1e-6
    codebook: Annotated[float, Field(ge=0)] = 1.0  # weight of the loss of a codebook,
    commitment: Annotated[float, Field(ge=0)] = 0.25  # and in it of what holds latents to their codes
    sample: bool = True  # decode a draw from the posterior; off: decode its mean


class PatchPCAPart(Section):
    """The linear codec: patch x patch pixels to latent_channels numbers, kernels reaching `overlap` pixels further."""

    latent_channels: Positive = 16
    patch: Positive = 8
    overlap: Count = 0


class Optimiser(Section):
    """AdamW."""

    rate: Annotated[float, Field(gt=0)] = 1e-4
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Annotated[float, Field(gt=0)] | None = 1.0  # norm of the gradient of each part
    warmup: Count = 0  # steps of linear rise
    schedule: Literal["cosine", "constant"] = "cosine"
    final: Share = 0.0  # cosine: last rate as a share of the first


class Ema(Section):
    """Moving average of the weights: what is validated, previewed and saved."""

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999  # 0: no average, the last weights count
    warmup: bool = True  # decay min(decay, (1 + n) / (10 + n)) after n steps


class Validation(Section):
    """Loss on fixed images, noise and times, averaged over bands of the clock."""

    every: Positive = 500
    bands: Positive = 5
    images: Positive = 64
    seed: int = 0


class Checkpoints(Section):
    """What makes a stopped run go on."""

    every: Positive = 500
    keep: Positive = 2


class Previews(Section):
    """Pictures drawn by the averaged weights through mezzotint.generate."""

    every: Count = 0  # 0: none
    count: Positive = 8
    steps: Positive = 20
    guidance: Annotated[float, Field(ge=0)] = 1.0
    sampler: str | None = None
    prompts: list[str] = []  # none: captions of the validation images, or of the training images
    seed: int = 0


class Sampling(Section):
    """What a request that names no sampler gets from the finished model."""

    sampler: str
    steps: Positive = 20
    guidance: Annotated[float, Field(ge=0)] = 1.0


class Lineage(Section):
    """What is written down of where the finished model comes from."""

    write: bool = True  # model/lineage: attestation, signature, bill of materials, events
    certificates: str = ""  # a folder of `mezzotint certs`; the user's own, made at first use, where left out
    server: str = ""  # address of an OpenLineage server that the events are posted to, too
    mlflow: str = ""  # address of an MLflow store that gets the run and a version of its model, too


class Recipe(Section):
    """The whole run."""

    _at: Path = PrivateAttr(Path("the recipe"))  # the file it was read from, for messages

    method: Literal["full", "vae", "patch-pca", "lora", "dreambooth", "textual-inversion", "controlnet", "lcm"]
    out: str  # the run folder
    steps: Positive
    batch: Positive  # images an optimiser step sees, over all pieces and processes
    accumulation: Positive = 1  # pieces a batch is computed in
    seed: Annotated[int, Field(ge=0)] = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    parallel: Literal["ddp", "fsdp2"] = "ddp"  # how several processes share the work
    recompute: bool = False  # activations are computed again in the backward pass: less memory, about a third more time
    threads: Count = 0  # 0: as torch decides
    log_every: Positive = 10
    licence: str | None = None  # of the finished weights; None: the base's
    data_licence: str | None = None
    data: Data
    base: Base | None = None
    backbone: Backbone | None = None
    codec: CodecPart | None = None
    process: dict[str, Any] | None = None
    classes: Classes | None = None
    text: Text | None = None
    inpaint: Inpaint | None = None
    loss: Loss = Loss()
    vae: Vae | None = None
    patch_pca: PatchPCAPart | None = None
    lora: Lora | None = None
    dreambooth: DreamBooth | None = None
    textual_inversion: TextualInversion | None = None
    controlnet: Control | None = None
    lcm: Lcm | None = None
    optimiser: Optimiser = Optimiser()
    ema: Ema = Ema()
    validation: Validation = Validation()
    checkpoints: Checkpoints = Checkpoints()
    previews: Previews = Previews()
    sampling: Sampling | None = None
    lineage: Lineage = Lineage()

    @property
    def at(self) -> Path:
        """The file that this was read from, or words for it."""
        return self._at
