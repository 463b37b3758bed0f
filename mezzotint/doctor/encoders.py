"""Other ways to read the same text encoder: another layer, another padding; what a wrong one is told apart by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mezzotint.text import TextEncoder
from mezzotint.text.clip import Clip
from mezzotint.text.joint import Joint
from mezzotint.text.llm import LanguageModel

LAYERS = (-2, -1, 1, 2)  # read so many layers earlier or later


@dataclass(frozen=True, slots=True)
class Otherwise:
    """A text encoder read in another way, and the cause that is named where the network prefers it."""

    cause: str
    says: str
    encoder: TextEncoder


def otherwise(encoder: TextEncoder) -> Iterator[Otherwise]:
    """Every other way to read an encoder; those of several side by side are changed together."""
    clips = _clips(encoder)

    def whole(changed: tuple[Clip, ...]) -> TextEncoder:
        return replace(encoder, clips=changed) if isinstance(encoder, Joint) else changed[0]

    for step in LAYERS if clips else ():
        layers = [clip.layer + step for clip in clips]
        if all(-clip.network.config.num_hidden_layers - 1 <= to <= -1 for clip, to in zip(clips, layers, strict=True)):
            changed = tuple(replace(clip, layer=to) for clip, to in zip(clips, layers, strict=True))
            yield Otherwise("text.layer", f"hidden state {layers[0]} in place of {clips[0].layer}", whole(changed))
    if clips:
        changed = tuple(replace(clip, norm=not clip.norm) for clip in clips)
        how = "without" if clips[0].norm else "with"
        yield Otherwise("text.layer", f"{how} the final norm", whole(changed))
    for word, paddings in _paddings(clips):
        changed = tuple(
            replace(clip, vocabulary=replace(clip.vocabulary, pad=pad))
            for clip, pad in zip(clips, paddings, strict=True)
        )
        yield Otherwise("text.padding", f"padded with {word!r}", whole(changed))
    if isinstance(encoder, LanguageModel):  # what is behind the last layer read is not there
        for step in (step for step in LAYERS if step < 0 <= min(encoder.layers) + step):
            layers = tuple(layer + step for layer in encoder.layers)
            yield Otherwise("text.layer", f"hidden states {layers}", replace(encoder, layers=layers))


def _clips(encoder: TextEncoder) -> tuple[Clip, ...]:
    if isinstance(encoder, Joint):
        return encoder.clips
    return (encoder,) if isinstance(encoder, Clip) else ()


def _paddings(clips: tuple[Clip, ...]) -> Iterator[tuple[str, list[int]]]:
    """The end token, the first token of the vocabulary ("!"), and the tokenizer's own padding, where they differ."""
    if not clips:
        return
    ways = {
        "end": [clip.vocabulary.end for clip in clips],
        "first": [0 for clip in clips],
        "own": [clip.vocabulary.tokenizer.pad_token_id or 0 for clip in clips],
    }
    seen = [[clip.vocabulary.pad for clip in clips]]
    for paddings in ways.values():
        if paddings not in seen:
            seen.append(paddings)  # pyright: ignore[reportArgumentType]
            yield str(clips[0].vocabulary.tokenizer.convert_ids_to_tokens(paddings[0])), paddings  # pyright: ignore
