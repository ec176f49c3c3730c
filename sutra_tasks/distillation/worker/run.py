"""One distillation, from texts to a version in the registry.

Each step leaves its result in the run's folder: the projection, checkpoints of the training, the
student. The teacher's vectors are in a folder that runs with the same texts and teacher share. So a run
that is delivered again continues where the last process stopped. The folder is named by a digest of
recipe, texts and teacher, so a changed recipe never continues from the results of another one.
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
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sutra_tasks.distillation.data.local_embedding import AT_ONCE, embed_locally
from sutra_tasks.distillation.data.teacher import Teacher, model_folder
from sutra_tasks.distillation.data.vector_cache import cached_vectors, count_shards, delete_old_runs
from sutra_tasks.distillation.measuring.model_card import card_facts, model_card
from sutra_tasks.distillation.names import fingerprint, model_name, runs_folder
from sutra_tasks.distillation.training.projection import jl, project, svd
from sutra_tasks.distillation.worker.attempts import limit_attempts
from sutra_tasks.engines.golden import GoldenVectors
from sutra_tasks.engines.load import load_engine
from sutra_tasks.errors import ModelError, SutraError
from sutra_tasks.files import read_array, read_json, write_array, write_json
from sutra_tasks.models.loaded.loading import check_golden
from sutra_tasks.models.registry.manifest import ParentModel, VersionFacts
from sutra_tasks.models.registry.names import shown_name
from sutra_tasks.models.registry.resolve import resolve_model_name

if TYPE_CHECKING:
    from sutra_tasks.distillation.config import DistillationConfig
    from sutra_tasks.distillation.data.run_texts import RunTexts
    from sutra_tasks.models.registry.model_registry import ModelRegistry
    from sutra_tasks.settings import Settings
    from sutra_tasks.vectors import Floats

__all__ = ["DistillationRun", "Report"]

logger = logging.getLogger(__name__)

PACKAGES: Final = ("sutra-tasks", "torch", "sentence-transformers")
ATTEMPTS: Final = "attempts.json"

Report = Callable[[Mapping[str, Any]], None]
"""Called often with the progress of a run. It may block to pause the run, or raise to end it."""


class DistillationRun:
    """One distillation; :meth:`make` continues where an earlier process stopped."""

    def __init__(
        self,
        config: DistillationConfig,
        texts: RunTexts,
        options: Settings,
        registry: ModelRegistry,
        *,
        report: Report,
        by_fleet: Callable[[Sequence[str], str], Iterable[Floats]] | None = None,
    ) -> None:
        """Prepare a run.

        Args:
            config: the recipe.
            texts: its texts.
            options: the deployment's settings.
            registry: gets the student as a version.
            report: gets the progress.
            by_fleet: yields the teacher's vectors of texts in an embedding space, computed by the fleet;
                None: they are computed here.
        """
        # The fleet may be simulated; the models that are learned from and measured are not.
        options = replace(options, engine="torch")
        self._config, self._texts, self._options, self._registry = config, texts, options, registry
        self._report, self._by_fleet = report, by_fleet
        self.name, runs = model_name(config), runs_folder(options)
        self._teacher = Teacher(config.teacher, options, registry, runs)
        space = self._teacher.space
        recipe = {**config.to_json(), "name": self.name}
        self.fingerprint = fingerprint([recipe, space, texts.fingerprint])
        self.folder = runs / self.fingerprint[:16]
        self._all_texts = [*texts.train, *texts.held_out, *self._labelled_texts()]
        self._vectors_folder = runs / f"teacher-{fingerprint([space, self._all_texts])[:16]}"

    def earlier_result(self) -> dict[str, Any] | None:
        """Return the result of an earlier run of the same recipe, texts and teacher, if any."""
        for manifest in reversed(self._registry.versions(self.name)):
            if manifest.fingerprint == self.fingerprint:
                return _result(manifest, self._texts, made=False)
        return None

    def make(self) -> dict[str, Any]:
        """Do the remaining steps and add the student to the registry.

        Returns:
            The task's result; see :class:`~sutra_tasks.distillation.distill_task.DistillTask`.

        Raises:
            ModelError: the run keeps ending its worker, or the recipe does not fit its models.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        delete_old_runs(self.folder.parent, time.time(), keep=(self.folder, self._vectors_folder))
        attempts = self.folder / ATTEMPTS
        with limit_attempts(attempts, self.name, self._position(), self._options.max_attempts):
            vectors = cached_vectors(
                self._vectors_folder, self._all_texts, self._vectors, report=self._report_vectors
            )
            learned = len(self._texts.train)
            matrix = self._matrix(vectors[:learned])
            training = self._student(vectors, matrix)
            return self._register(training, vectors[learned:], matrix)

    def _position(self) -> str:
        """Return how far the run is."""
        # The names of checkpoints have the step, so none is read, and torch is not imported.
        steps = sorted(path.name for path in self.folder.glob("checkpoint-*"))
        shards = count_shards(self._vectors_folder)
        return steps[-1] if steps else f"{shards} shards of the teacher's vectors"

    def _report_vectors(self, progress: Mapping[str, Any]) -> None:
        by = "this worker" if self._by_fleet is None else "the fleet"
        self._report({**progress, "by": by})

    def _labelled_texts(self) -> list[str]:
        return list(dict.fromkeys(text for pair in self._texts.pairs for text in pair))

    def _vectors(self, texts: Sequence[str]) -> Generator[Floats]:
        """Yield the teacher's vectors of texts, some rows at a time."""
        done = 0
        if self._by_fleet is not None:
            try:
                for row in self._by_fleet(texts, self._teacher.space):
                    done += 1
                    yield row[None]
            except SutraError as error:
                # Devices may serve another model by that name, or have died; the run continues alone.
                logger.warning(
                    "the fleet gives no vectors of the teacher, they are computed here: %s", error
                )
                self._by_fleet = None
        for start in range(done, len(texts), AT_ONCE):
            yield embed_locally(self._teacher.encoder, texts[start : start + AT_ONCE])

    def _matrix(self, vectors: Floats) -> Floats:
        """Return the projection; stored, because another CPU would compute other last bits."""
        width, path = self._config.output_dim or vectors.shape[1], self.folder / "matrix.npy"
        matrix = read_array(path)
        if matrix is None:
            if not np.isfinite(vectors).all():
                raise ModelError(self._teacher.name, "gives vectors that are not numbers for some texts")
            if self._config.projection == "svd":
                matrix = svd(vectors, width)
            else:
                matrix = jl(vectors.shape[1], width, np.random.default_rng(self._config.seed))
            write_array(path, matrix)
        return matrix

    def _student(self, vectors: Floats, matrix: Floats) -> dict[str, Any]:
        """Train the student, save it in the run's folder, and return the facts of its training."""
        done = self.folder / "trained.json"
        if done.exists():
            return read_json(done)
        # torch takes seconds to import, and a worker without a run needs none.
        from sutra_tasks.distillation.training.students import build_student, save_student  # noqa: PLC0415
        from sutra_tasks.distillation.training.trainer import train  # noqa: PLC0415

        config, texts = self._config, self._texts
        self._report({"phase": "student"})
        named = None
        if config.student_model is not None:
            reference = resolve_model_name(
                config.student_model, self._options, self._registry, what="student_model"
            )
            named = self._load_modules(reference)
        teacher = self._load_modules(self._teacher.reference)
        student = build_student(config, teacher, matrix, texts.train, student_model=named)
        facts: dict[str, Any] = {"epochs": 0, "steps": 0, "curves": [], "seconds": 0.0}
        if config.student != "projection":
            targets = project(matrix, vectors)
            learned, measured = len(texts.train), len(texts.train) + len(texts.held_out)
            result = train(
                student,
                texts.train,
                targets[:learned],
                texts.held_out,
                targets[learned:measured],
                texts.task_pairs,
                config,
                self.folder,
                on_step=lambda progress: self._report({"phase": "training", **asdict(progress)}),
            )
            facts = {name: getattr(result, name) for name in facts}
        shutil.rmtree(self.folder / "student", ignore_errors=True)
        save_student(student, self.folder / "student", config.half_precision)
        write_json(done, facts)
        return facts

    def _load_modules(self, reference: str) -> Any:
        """Load a model's torch modules in float32, to build the student of them."""
        from sentence_transformers import SentenceTransformer  # noqa: PLC0415

        folder = str(model_folder(reference, self._registry))
        return SentenceTransformer(folder, device="cpu", trust_remote_code=False).float()

    def _shown_recipe(self) -> DistillationConfig:
        """Return the recipe for readers who do not know this machine: models by name, not by path."""
        student_model = self._config.student_model
        return replace(
            self._config,
            teacher=self._teacher.name,
            student_model=None if student_model is None else shown_name(student_model),
        )

    def _register(self, training: Mapping[str, Any], vectors: Floats, matrix: Floats) -> dict[str, Any]:
        """Measure the student in the engine that will serve it, and add it to the registry.

        Args:
            training: the facts of its training.
            vectors: the teacher's, of the held-out and the labelled texts.
            matrix: the projection.
        """
        from sutra_tasks.distillation.measuring.measurement import measure_student  # noqa: PLC0415
        from sutra_tasks.distillation.measuring.report import render  # noqa: PLC0415

        self._report({"phase": "measuring"})
        folder, config = self.folder / "student", self._shown_recipe()
        student = load_engine(self._options, self.name, folder)
        golden = GoldenVectors.of(student)
        check_golden(self.name, golden, None)
        count = len(self._texts.held_out)
        measured = measure_student(
            self._teacher.encoder,
            student,
            held_out=self._texts.held_out,
            teacher_held_out=vectors[:count],
            pairs=self._texts.pairs,
            teacher_labelled=dict(zip(self._labelled_texts(), vectors[count:], strict=True)),
            matrix=matrix,
            folders=(self._teacher.folder, folder),
            seed=config.seed,
        )
        report = {
            "name": self.name,
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "teacher": {"name": self._teacher.name, "space": self._teacher.space},
            "student": {"space": student.info.space, "width": student.info.width},
            "recipe": config.to_json(),
            "corpus": dict(self._texts.facts),
            "training": dict(training),
            **measured,
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        }
        (folder / "README.md").write_text(model_card(config, card_facts(report)), "utf-8")
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
        (folder / "report.html").write_text(render(report), "utf-8")
        self._report({"phase": "registering"})
        manifest = self._registry.add(
            self.name,
            folder,
            VersionFacts(
                space=student.info.space,
                width=student.info.width,
                golden=golden.to_json(),
                parent=ParentModel(self._teacher.name, self._teacher.space),
                metrics={**measured["metrics"], "spearman": measured["quality"]["spearman"]["value"]},
                recipe=config.to_json(),
                fingerprint=self.fingerprint,
            ),
        )
        shutil.rmtree(self.folder, ignore_errors=True)
        return _result(manifest, self._texts, made=True)


def _result(manifest: Any, texts: RunTexts, *, made: bool) -> dict[str, Any]:
    return {
        "model": f"{manifest.name}@{manifest.version}",
        "made": made,
        "space": manifest.space,
        "metrics": dict(manifest.metrics),
        "report": "report.html",
        "bad_rows": texts.facts["bad_rows"],
    }
