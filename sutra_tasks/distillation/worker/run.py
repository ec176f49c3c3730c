"""One distillation from files to a version in the registry, step by step.

Everything a run has done is in its folder, so whoever runs it next goes on there: the teacher's vectors
in shards, the projection, checkpoints of the training, the student. The folder's name is a digest of
recipe, texts and teacher, so another recipe never meets the remains of this one.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from sutra_tasks.distillation.data.local_embedding import AT_ONCE, embed_locally
from sutra_tasks.distillation.data.teacher import Teacher, place_of
from sutra_tasks.distillation.data.vector_cache import (
    cached_vectors,
    count_shards,
    delete_old_runs,
    digest,
)
from sutra_tasks.distillation.measuring.model_card import model_card
from sutra_tasks.distillation.names import model_name, runs_folder
from sutra_tasks.distillation.training.projection import jl, project, svd
from sutra_tasks.distillation.worker.attempts import limit_attempts
from sutra_tasks.engines.golden import GoldenVectors
from sutra_tasks.engines.load import load_engine
from sutra_tasks.errors import SutraError
from sutra_tasks.files import read_array, read_json, write_array, write_json
from sutra_tasks.models.registry.manifest import ParentModel, VersionFacts
from sutra_tasks.models.registry.resolve import resolve_model_name

if TYPE_CHECKING:
    from sutra_tasks.distillation.config import DistillationConfig
    from sutra_tasks.distillation.data.run_texts import RunTexts
    from sutra_tasks.models.registry.model_registry import ModelRegistry
    from sutra_tasks.settings import Settings
    from sutra_tasks.vectors import Floats

__all__ = ["DistillationRun", "Watch"]

logger = logging.getLogger(__name__)

PACKAGES: Final = ("sutra-tasks", "torch", "sentence-transformers")
STARTS: Final = "starts.json"


class Watch(Protocol):
    """Who looks on while a run runs."""

    def __call__(self, progress: Mapping[str, Any]) -> None:
        """Take note of how far it is, often; may wait while the run should pause, or raise to end it."""


class DistillationRun:
    """One distillation; :meth:`make` goes on where an earlier process left off."""

    def __init__(
        self,
        config: DistillationConfig,
        material: RunTexts,
        options: Settings,
        registry: ModelRegistry,
        *,
        watch: Watch,
        by_fleet: Callable[[Sequence[str], str], Iterable[Floats]] | None = None,
    ) -> None:
        """Prepare.

        Args:
            config: the recipe.
            material: its texts.
            options: of this deployment.
            registry: the registry that gets the result.
            watch: told of progress.
            by_fleet: gives the vectors of texts by a model, if a fleet serves it; else they are computed
                here.
        """
        # A fleet may be simulated; what is learned from is not.
        options = replace(options, engine="torch")
        self._config, self._material, self._options, self._registry = config, material, options, registry
        self._watch, self._by_fleet = watch, by_fleet
        self.name, runs = model_name(config), runs_folder(options)
        self._teacher = Teacher(config.teacher, options, registry, runs)
        space = self._teacher.space
        recipe = {**config.to_json(), "name": self.name}
        self.fingerprint = digest([recipe, space, material.fingerprint])
        self.folder = runs / self.fingerprint[:16]
        self._texts = [*material.train, *material.held_out, *self._labelled_texts()]
        # The teacher's vectors serve every recipe with these texts.
        self._shards = runs / f"teacher-{digest([space, self._texts])[:16]}"

    def made(self) -> dict[str, Any] | None:
        """Return the result of an earlier run of the same recipe, texts and teacher, if one was."""
        for manifest in reversed(self._registry.versions(self.name)):
            if manifest.fingerprint == self.fingerprint:
                return _result(manifest, self._material, made=False)
        return None

    def make(self) -> dict[str, Any]:
        """Do what is left to do and register the student.

        Returns:
            What the task returns; see :class:`~sutra_tasks.distillation.distill_task.DistillTask`.

        Raises:
            ModelError: the recipe ends its workers, or cannot be followed with these models.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        delete_old_runs(self.folder.parent, time.time(), but=(self.folder, self._shards))
        with limit_attempts(self.folder / STARTS, self.name, self._at(), self._options.max_attempts):
            vectors = cached_vectors(self._shards, self._texts, self._vectors, watch=self._watch_teacher)
            learned = len(self._material.train)
            matrix = self._matrix(vectors[:learned])
            trained = self._student(vectors, matrix)
            return self._register(trained, vectors[learned:], matrix)

    def _at(self) -> str:
        """Say how far it is."""
        # Neither is torch needed for this, nor is a checkpoint read twice: its name says the step.
        steps = sorted(path.name for path in self.folder.glob("checkpoint-*"))
        return steps[-1] if steps else f"{count_shards(self._shards)} shards of the teacher's vectors"

    def _watch_teacher(self, progress: Mapping[str, Any]) -> None:
        by = "this worker" if self._by_fleet is None else "the fleet"
        self._watch({**progress, "by": by})

    def _labelled_texts(self) -> list[str]:
        return list(dict.fromkeys(text for pair in self._material.pairs for text in pair))

    def _vectors(self, texts: Sequence[str]) -> Generator[Floats]:
        """Yield the teacher's vectors of texts, some rows at a time."""
        done = 0
        if self._by_fleet is not None:
            try:
                for row in self._by_fleet(texts, self._teacher.space):
                    done += 1
                    yield row[None]
            except SutraError as error:
                # Another model goes by that name there, or no device lives: a run is not lost for that.
                logger.warning(
                    "the fleet gives no vectors of the teacher, they are computed here: %s", error
                )
                self._by_fleet = None
        for start in range(done, len(texts), AT_ONCE):
            yield embed_locally(self._teacher.encoder, texts[start : start + AT_ONCE])

    def _matrix(self, vectors: Floats) -> Floats:
        """Return the projection, computed once: another CPU rounds its last bits in another way."""
        width, path = self._config.output_dim or vectors.shape[1], self.folder / "matrix.npy"
        matrix = read_array(path)
        if matrix is None:
            if self._config.projection == "svd":
                matrix = svd(vectors, width)
            else:
                matrix = jl(vectors.shape[1], width, np.random.default_rng(self._config.seed))
            write_array(path, matrix)
        return matrix

    def _student(self, vectors: Floats, matrix: Floats) -> dict[str, Any]:
        """Train the student and save it in the run's folder; return what its training came to."""
        done = self.folder / "trained.json"
        if done.exists():
            return read_json(done)
        # torch takes seconds to import, and a worker that waits for work needs none.
        from sutra_tasks.distillation.training.students import build_student, save_student  # noqa: PLC0415
        from sutra_tasks.distillation.training.trainer import train  # noqa: PLC0415

        config, material = self._config, self._material
        self._watch({"phase": "student"})
        named = None
        if config.student_model is not None:
            reference = resolve_model_name(
                config.student_model, self._options, self._registry, what="student_model"
            )
            named = self._modules(reference)
        student = build_student(
            config, self._modules(self._teacher.reference), matrix, material.train, student_model=named
        )
        facts: dict[str, Any] = {"epochs": 0, "steps": 0, "curves": [], "seconds": 0.0}
        if config.student != "projection":
            targets = project(matrix, vectors)
            learned, measured = len(material.train), len(material.train) + len(material.held_out)
            trained = train(
                student,
                material.train,
                targets[:learned],
                material.held_out,
                targets[learned:measured],
                material.task_pairs,
                config,
                self.folder,
                on_step=lambda progress: self._watch({"phase": "training", **asdict(progress)}),
            )
            facts = {name: getattr(trained, name) for name in facts}
        shutil.rmtree(self.folder / "student", ignore_errors=True)
        save_student(student, self.folder / "student", config.half_precision)
        write_json(done, facts)
        return facts

    def _modules(self, reference: str) -> Any:
        """Load a model to be taken apart, in float32."""
        from sentence_transformers import SentenceTransformer  # noqa: PLC0415

        folder = str(place_of(reference, self._registry))
        return SentenceTransformer(folder, device="cpu", trust_remote_code=False).float()

    def _register(self, trained: Mapping[str, Any], vectors: Floats, matrix: Floats) -> dict[str, Any]:
        """Measure the student as it will serve, and make it a version of the registry."""
        from sutra_tasks.distillation.measuring.measurement import measure_student  # noqa: PLC0415
        from sutra_tasks.distillation.measuring.report import render  # noqa: PLC0415

        self._watch({"phase": "measuring"})
        folder, config = self.folder / "student", self._config
        student = load_engine(self._options, self.name, folder)
        count = len(self._material.held_out)
        found = measure_student(
            self._teacher.encoder,
            student,
            held_out=self._material.held_out,
            rows=vectors[:count],
            pairs=self._material.pairs,
            teacher_of=dict(zip(self._labelled_texts(), vectors[count:], strict=True)),
            matrix=matrix,
            folders=(self._teacher.place, folder),
            seed=config.seed,
        )
        facts = {
            "name": self.name,
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "teacher": {"name": self._teacher.reference, "space": self._teacher.space},
            "student": {"space": student.info.space, "width": student.info.width},
            "recipe": config.to_json(),
            "corpus": dict(self._material.facts),
            "training": dict(trained),
            **found,
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        }
        (folder / "README.md").write_text(model_card(config, _card_facts(facts)), "utf-8")
        (folder / "report.json").write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
        (folder / "report.html").write_text(render(facts), "utf-8")
        self._watch({"phase": "registering"})
        manifest = self._registry.add(
            self.name,
            folder,
            VersionFacts(
                space=student.info.space,
                width=student.info.width,
                golden=GoldenVectors.of(student).to_json(),
                parent=ParentModel(self._teacher.reference, self._teacher.space),
                metrics={**found["metrics"], "spearman": found["quality"]["spearman"]["value"]},
                recipe=config.to_json(),
                fingerprint=self.fingerprint,
            ),
        )
        shutil.rmtree(self.folder, ignore_errors=True)
        return _result(manifest, self._material, made=True)


def _result(manifest: Any, material: RunTexts, *, made: bool) -> dict[str, Any]:
    return {
        "model": f"{manifest.name}@{manifest.version}",
        "made": made,
        "space": manifest.space,
        "metrics": dict(manifest.metrics),
        "report": "report.html",
        "bad_rows": material.facts["bad_rows"],
    }


def _card_facts(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the model card shows of a report: counts and figures."""
    measured = {
        name: value["value"] if isinstance(value, Mapping) else value
        for name, value in report["quality"].items()
        if value is not None
    }
    counts = {name: value for name, value in report["corpus"].items() if isinstance(value, int)}
    sizes = {f"{name}, teacher and student": value for name, value in report["sizes"].items()}
    speed = {"speed_improvement": report["speed"]["speed_improvement"]}
    return {
        "Texts": counts,
        "Quality on held-out text": measured,
        "Speed and size": speed | sizes,
    }
