"""The sizes of chunks, from the settings and the model; all of them count tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sutra_tasks.chunking.chunker import MOST_OVERLAP, Chunker
from sutra_tasks.errors import ModelError

if TYPE_CHECKING:
    from sutra_tasks.engines.encoder import Encoder, ModelInfo
    from sutra_tasks.settings import Settings

__all__ = ["ChunkSizes", "added_tokens"]

USUAL_BLOCK: Final = 512
USUAL_OVERLAP: Final = 50
PROBE: Final = "a"


@dataclass(frozen=True, slots=True)
class ChunkSizes:
    """The sizes for one model.

    Attributes:
        threshold: up to which a text is embedded whole, special tokens and prompt included.
        block: of a chunk at most, special tokens and prompt included.
        overlap: that two neighbouring chunks share.
        gives_way: whether the overlap shrinks for a window that is too small for it: nobody set it.
    """

    threshold: int
    block: int
    overlap: int
    gives_way: bool = False

    @classmethod
    def of(cls, info: ModelInfo, options: Settings) -> ChunkSizes:
        """Return the sizes that the settings name, else the usual ones for the model."""
        usual = min(USUAL_BLOCK, info.window)
        threshold = options.sequence_threshold or (info.window if info.is_static else usual)
        gives_way = options.block_size is None and options.overlap_tokens == USUAL_OVERLAP
        return cls(threshold, options.block_size or usual, options.overlap_tokens, gives_way)

    def chunker(self, added: int) -> Chunker:
        """Return the chunker of a text to which special tokens and prompt add ``added`` tokens."""
        block = self.block - added
        # `check` measured a probe: behind the last characters of a prompt a text may begin with one
        # token less, so that the overlap would be too large by a fraction.
        return Chunker(block, min(self.overlap, int(MOST_OVERLAP * block)))

    def check(self, encoder: Encoder, *, late: bool) -> None:
        """Refuse sizes that do not fit the model.

        Args:
            encoder: of the model.
            late: whether chunks are pooled from passes over windows.

        Raises:
            ModelError: threshold or block are over its window, the overlap is too large for the block
                (under one of its prompts perhaps), or the model is none for late chunking.
        """
        info = encoder.info
        for name, tokens in (
            ("SUTRA_SEQUENCE_THRESHOLD", self.threshold),
            ("SUTRA_BLOCK_SIZE", self.block),
        ):
            if tokens > info.window:
                raise ModelError(info.model, f"{name}={tokens} is over its window of {info.window}")
        if late:
            if not info.pools_mean:
                raise ModelError(
                    info.model, "SUTRA_CHUNKING=late needs a model that takes the mean of its tokens"
                )
            if self.block > MOST_OVERLAP * info.window:
                raise ModelError(
                    info.model,
                    f"SUTRA_CHUNKING=late needs blocks smaller than 85 % of its window of {info.window}",
                )
        for prompt in (None, *info.prompts):
            try:
                added = added_tokens(encoder, prompt)
                if self.gives_way:
                    self.chunker(added)
                else:
                    Chunker(self.block - added, self.overlap)
            except ValueError as error:
                shown = prompt or info.default_prompt
                where = f" under its prompt {shown!r}" if shown else ""
                raise ModelError(
                    info.model, f"{error}{where}. Change SUTRA_OVERLAP_TOKENS or SUTRA_BLOCK_SIZE"
                ) from None


def added_tokens(encoder: Encoder, prompt: str | None) -> int:
    """Return how many tokens the special tokens and a prompt add to a text."""
    (probe,) = encoder.tokenize([PROBE], prompt)
    return probe.tokens - len(encoder.offsets(probe))
