"""The training loop, which can be paused, stopped, killed and continued.

Everything that decides a run follows from its arguments and the number of the step, or is in its
checkpoints, so a run that was killed ends with the same weights as one that was not. Dropout is off: the
targets are fixed, so noise in the student would only slow down learning.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch.nn import functional

from sutra_tasks.distillation.training import checkpoints
from sutra_tasks.distillation.training.batches import Ids, StudentTokenizer, TrainingData, epoch_order
from sutra_tasks.distillation.training.checkpoints import Checkpoint
from sutra_tasks.distillation.training.losses import DistillationLoss
from sutra_tasks.distillation.training.optimizer import build_optimizer, learning_rate_share
from sutra_tasks.distillation.training.progress import TrainingProgress, TrainingResult, TrainingState
from sutra_tasks.distillation.training.students import outputs
from sutra_tasks.errors import TrainingDivergedError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from sutra_tasks.distillation.config import DistillationConfig
    from sutra_tasks.vectors import Floats

__all__ = ["TrainingProgress", "TrainingResult", "train"]

BEST: Final = "best.safetensors"
MOST_GRADIENT_NORM: Final = 1.0
EVALUATED_AT_ONCE: Final = 64
MOST_GROWTH: Final = 100.0
"""How often the first loss, or 1 if that is less, a loss is when the training has diverged: the loss of
unit vectors that have nothing in common is about 1."""
MOMENTS: Final = ("exp_avg", "exp_avg_sq")
"""Names of AdamW's state of each weight, beside its step."""

logger = logging.getLogger(__name__)


def train(  # noqa: PLR0917 - texts and their targets, then how to train
    student: SentenceTransformer,
    texts: Sequence[str],
    targets: Floats,
    held_out: Sequence[str],
    held_out_targets: Floats,
    pairs: Sequence[tuple[str, str]],
    config: DistillationConfig,
    folder: Path,
    *,
    on_step: Callable[[TrainingProgress], None],
    clock: Callable[[], float] = time.monotonic,
) -> TrainingResult:
    """Train ``student`` in place; with the same arguments, continue a run that was killed.

    Args:
        student: returned by :func:`~sutra_tasks.distillation.training.students.build_student`.
        texts: to learn from.
        targets: the teacher's projected vectors of them, unit rows, shape (texts, width).
        held_out: texts to measure on.
        held_out_targets: the teacher's projected vectors of them.
        pairs: labelled (query, answer) pairs for the task loss.
        config: the recipe.
        folder: for checkpoints and the best weights. Checkpoints of another recipe or of other texts are
            deleted.
        on_step: called after every step. It may block, which counts as a pause, or raise, which ends
            the run: a checkpoint is written, and the exception is raised.
        clock: gives seconds that only grow.

    Raises:
        TrainingDivergedError: the loss or the gradient exploded; checkpoints and best weights stay as
            they are.
        ValueError: there is no text to learn from or to measure on, or shapes do not fit.
    """
    data = TrainingData(texts, targets, held_out, held_out_targets, pairs)
    folder.mkdir(parents=True, exist_ok=True)
    training = _Training(student, data, config, folder, clock)
    training.resume()
    while not training.state.finished:
        training.advance(on_step)
    return training.finish()


class _Training:
    """One call of :func:`train`."""

    def __init__(
        self,
        student: SentenceTransformer,
        data: TrainingData,
        config: DistillationConfig,
        folder: Path,
        clock: Callable[[], float],
    ) -> None:
        self._student, self._config, self._folder, self._clock = student.eval(), config, folder, clock
        self._reader = StudentTokenizer(student)
        self._ids, self._held_out = self._reader.ids(data.texts), self._reader.ids(data.held_out)
        self._lengths = [len(ids) for ids in self._ids]
        self._pairs = [self._reader.ids(side) for side in zip(*data.pairs, strict=True)]
        self._targets = torch.from_numpy(np.array(data.targets))
        self._held_out_targets = torch.from_numpy(np.array(data.held_out_targets))
        self._bfloat16 = _has_fast_bfloat16(student.device)
        self._loss = DistillationLoss.of(config)
        self._rng = np.random.default_rng(config.seed)
        self._fingerprint = data.fingerprint(config)
        self._weights = {
            name: weight for name, weight in student.named_parameters() if weight.requires_grad
        }
        self._optimizer = build_optimizer(self._weights, config)
        self._epoch_steps = math.ceil(len(self._ids) / config.batch_size)
        self._steps = self._epoch_steps * config.max_epochs
        self._order: tuple[int, list[list[int]]] = (-1, [])
        self._began_at, self._began_step = 0.0, 0
        self._saved_step, self._saved_at = 0, 0.0
        self.state = TrainingState()

    def resume(self) -> None:
        """Continue from the last checkpoint, if it is of this run."""
        found = checkpoints.latest(self._folder)
        if found is None:
            return
        if found.scalars.get("fingerprint") != self._fingerprint:
            logger.warning("the checkpoints found are of another recipe or of other data: starting anew")
            checkpoints.clear(self._folder)
            return
        self.state = TrainingState(**found.scalars["state"])
        self._rng.bit_generator.state = found.scalars["rng"]
        torch.set_rng_state(torch.from_numpy(found.tensors["rng/torch"]))
        self._load(found.tensors)
        self._saved_step, self._saved_at = found.step, self.state.worked_s
        self._began_at, self._began_step = self.state.worked_s, found.step
        logger.info("going on at step %d of %d", found.step, self._steps)

    def advance(self, on_step: Callable[[TrainingProgress], None]) -> None:
        """Do one step, and evaluate and write a checkpoint if they are due."""
        began = self._clock()
        state = self.state
        numbers = self._learn()
        state.step += 1
        state.since += 1
        state.sums = {name: state.sums.get(name, 0.0) + value for name, value in numbers.items()}
        ended = state.step == self._steps
        if ended or state.step % (self._config.eval_steps or self._epoch_steps) == 0:
            self._evaluate()
        state.finished |= ended
        state.worked_s += self._clock() - began
        if state.finished or checkpoints.due(
            state.step, self._saved_step, state.worked_s, self._saved_at, self._config
        ):
            self._save()
        try:
            on_step(self._progress(numbers))
        except BaseException:
            if self._saved_step != state.step:
                self._save()
            raise

    def finish(self) -> TrainingResult:
        """Give the student its best weights, and return the result."""
        self._load(
            {f"model/{name}": a for name, a in checkpoints.read_tensors(self._folder / BEST).items()}
        )
        state = self.state
        epochs = math.ceil(state.step / self._epoch_steps)
        return TrainingResult(
            state.best_quality or 0.0, epochs, state.step, state.curves, state.worked_s
        )

    def _learn(self) -> dict[str, float]:
        """Do one step of the optimizer, if the weights stay sound; return the loss and its terms."""
        step, config = self.state.step, self._config
        share = learning_rate_share(step, self._steps, config.warmup_share)
        for group in self._optimizer.param_groups:
            group["lr"] = config.learning_rate * share
        rows = self._batch(step)
        found = self._forward([self._ids[row] for row in rows])
        terms = self._loss(found, self._targets[rows].to(found.device), self._paired())
        self._optimizer.zero_grad(set_to_none=True)
        terms.total.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(list(self._weights.values()), MOST_GRADIENT_NORM)
        numbers = terms.numbers()
        self._check(numbers["loss"], float(norm))
        self._optimizer.step()
        return numbers

    def _check(self, loss: float, gradient_norm: float) -> None:
        """Raise a TrainingDivergedError if the next weights would be worth nothing."""
        state = self.state
        if state.first_loss is None:
            state.first_loss = loss
        first = state.first_loss
        if not math.isfinite(loss + gradient_norm) or loss > MOST_GROWTH * max(1.0, first):
            figures = f"loss {loss:.4g}, gradient norm {gradient_norm:.4g}, first loss {first:.4g}"
            raise self._diverged(state.step + 1, figures)

    def _diverged(self, step: int, figures: str) -> TrainingDivergedError:
        learning_rate, kept_step = self._config.learning_rate, self._saved_step or None
        return TrainingDivergedError(step, self._steps, figures, learning_rate, kept_step)

    def _batch(self, step: int) -> list[int]:
        epoch, position = divmod(step, self._epoch_steps)
        if self._order[0] != epoch:
            size, seed = self._config.batch_size, self._config.seed
            self._order = epoch, epoch_order(self._lengths, size, seed, epoch)
        return self._order[1][position]

    def _paired(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        if not (self._pairs and self._config.task_weight):
            return None
        queries, positives = self._pairs
        count = min(self._config.batch_size, len(queries))
        drawn = self._rng.choice(len(queries), size=count, replace=False)
        first, second = (self._forward([side[at] for at in drawn]) for side in (queries, positives))
        return first, second

    def _forward(self, batch: Sequence[Ids]) -> torch.Tensor:
        features = self._reader.features(batch)
        with torch.autocast(self._student.device.type, torch.bfloat16, enabled=self._bfloat16):
            found = outputs(self._student, features)
        return found.float()

    def _evaluate(self) -> None:
        state = self.state
        quality = self._quality()
        if not math.isfinite(quality):
            raise self._diverged(state.step, f"cosine on held-out texts {quality}")
        state.quality = quality
        means = {name: total / max(1, state.since) for name, total in state.sums.items()}
        state.curves.append({"step": state.step, "quality": quality} | means)
        state.sums, state.since = {}, 0
        if state.best_quality is None or quality > state.best_quality:
            state.best_quality, state.without_better = quality, 0
            checkpoints.write_tensors(self._folder / BEST, _arrays(self._weights))
        else:
            state.without_better += 1
        state.finished = (
            quality > self._config.quality_threshold or state.without_better >= self._config.patience
        )

    def _quality(self) -> float:
        by_length = sorted(range(len(self._held_out)), key=lambda at: len(self._held_out[at]))
        total = 0.0
        with torch.inference_mode():
            for start in range(0, len(by_length), EVALUATED_AT_ONCE):
                rows = by_length[start : start + EVALUATED_AT_ONCE]
                features = self._reader.features([self._held_out[row] for row in rows])
                unit = functional.normalize(outputs(self._student, features).float(), dim=1).cpu()
                total += float((unit * self._held_out_targets[rows]).sum())
        return total / len(by_length)

    def _save(self) -> None:
        state, tensors = self.state, {"rng/torch": torch.get_rng_state().numpy()}
        tensors |= {f"model/{name}": array for name, array in _arrays(self._weights).items()}
        for name, weight in self._weights.items():
            known = self._optimizer.state.get(weight, {})
            tensors |= {f"{kind}/{name}": known[kind].cpu().numpy() for kind in MOMENTS if known}
        scalars = {
            "fingerprint": self._fingerprint,
            "state": asdict(state),
            "rng": self._rng.bit_generator.state,
        }
        epoch = state.step // self._epoch_steps
        checkpoints.write(self._folder, Checkpoint(state.step, epoch, tensors, scalars))
        self._saved_step, self._saved_at = state.step, state.worked_s

    def _load(self, tensors: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(torch.from_numpy(tensors[f"model/{name}"]))
                if f"{MOMENTS[0]}/{name}" in tensors:
                    moments = {
                        kind: torch.from_numpy(tensors[f"{kind}/{name}"]).to(weight.device)
                        for kind in MOMENTS
                    }
                    steps = torch.tensor(float(self.state.step), device=weight.device)
                    self._optimizer.state[weight] = {"step": steps, **moments}

    def _progress(self, numbers: Mapping[str, float]) -> TrainingProgress:
        state, config = self.state, self._config
        worked, done = state.worked_s - self._began_at, state.step - self._began_step
        a_step = worked / done
        return TrainingProgress(
            epoch=math.ceil(state.step / self._epoch_steps),
            epochs=config.max_epochs,
            step=state.step,
            steps=self._steps,
            quality=state.quality,
            best_quality=state.best_quality,
            texts_per_s=len(self._ids) / self._epoch_steps / a_step if a_step else 0.0,
            left_s=0.0 if state.finished else (self._steps - state.step) * a_step,
            **numbers,
        )


def _arrays(weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {name: weight.detach().cpu().numpy() for name, weight in weights.items()}


def _has_fast_bfloat16(device: torch.device) -> bool:
    """Return whether bfloat16 makes training faster: a CPU without it emulates it, which is slower."""
    if device.type != "cpu":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
