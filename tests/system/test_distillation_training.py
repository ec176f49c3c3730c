"""Students, losses and the training loop, on models of a few thousand weights."""

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize

from sutra_tasks.distillation.config import DistillationConfig
from sutra_tasks.distillation.data.local_embedding import embed_locally
from sutra_tasks.distillation.measuring.measurement import bytes_on_disk
from sutra_tasks.distillation.measuring.model_card import model_card
from sutra_tasks.distillation.measuring.speed import speed_ratio
from sutra_tasks.distillation.training import checkpoints, trainer
from sutra_tasks.distillation.training.batches import StudentTokenizer, epoch_order
from sutra_tasks.distillation.training.losses import DistillationLoss, contrastive
from sutra_tasks.distillation.training.optimizer import learning_rate_share
from sutra_tasks.distillation.training.projection import project, svd
from sutra_tasks.distillation.training.students import (
    build_student,
    chosen_layers,
    outputs,
    save_student,
    token_vectors,
)
from sutra_tasks.distillation.training.trainer import train
from sutra_tasks.engines.load import load_engine
from sutra_tasks.errors import ModelError, TrainingDivergedError
from sutra_tasks.settings import Settings
from tests.system.model_kinds import ODD
from tests.system.tiny_models import KINDS, PROSE, build

if TYPE_CHECKING:
    from sutra_tasks.distillation.training.progress import TrainingProgress

WIDTH = 16
WORDS = PROSE.replace(".", "").replace(",", "").split()
TEXTS = [
    " ".join(np.random.default_rng(at).choice(WORDS, size=2 + at % 11).tolist()) for at in range(120)
]
CONFIG = DistillationConfig(
    teacher="tiny", texts=("a.txt",), output_dim=WIDTH, layers=1, batch_size=8, max_epochs=3,
    learning_rate=3e-3, similarity_weight=1.0, checkpoint_steps=4, eval_steps=5, patience=50,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build(KINDS["bert"], tmp_path_factory.mktemp("tiny"))


def load(folder):
    return SentenceTransformer(str(folder), device="cpu", trust_remote_code=False)


@pytest.fixture(scope="module")
def teacher(folder):
    return load(folder)


@pytest.fixture(scope="module")
def vectors(teacher):
    return teacher.encode(TEXTS, normalize_embeddings=True)


@pytest.fixture(scope="module")
def matrix(vectors):
    return svd(vectors, WIDTH)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def cosines(first, second):
    return (unit(first) * unit(second)).sum(axis=1)


# Students.


@given(total=st.integers(1, 48), data=st.data())
def test_chosen_layers_are_evenly_spaced_from_the_first_to_the_last(total, data):
    wanted = data.draw(st.integers(1, total))
    kept = chosen_layers(total, wanted)
    assert len(kept) == wanted
    assert kept[0] == 0
    gaps = [after - before for before, after in pairwise(kept)]
    assert wanted == 1 or (kept[-1] == total - 1 and min(gaps) >= 1 and max(gaps) - min(gaps) <= 1)


@pytest.mark.parametrize(("total", "wanted"), [(6, 0), (6, 7), (0, 1)])
def test_no_layers_or_more_than_there_are_cannot_be_chosen(total, wanted):
    with pytest.raises(ValueError):
        chosen_layers(total, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_of_fewer_layers_starts_at_unit_mean_norm_and_leaves_its_teacher_alone(kind, tmp_path):
    teacher = load(build(KINDS[kind], tmp_path))
    before = teacher.encode(TEXTS[:20])
    matrix = svd(unit(before), 8)
    student = build_student(replace(CONFIG, output_dim=8), teacher, matrix, TEXTS)
    reader = StudentTokenizer(student)
    with torch.no_grad():
        found = outputs(student, reader.features(reader.ids(TEXTS)))
    assert float(found.norm(dim=1).mean()) == pytest.approx(1, abs=1e-4)
    assert found.shape == (len(TEXTS), 8)
    transformer: Any = student[0]
    assert transformer.auto_model.config.num_hidden_layers == 1
    counts = [sum(weight.numel() for weight in one.parameters()) for one in (student, teacher)]
    assert counts[0] < counts[1]
    assert student.prompts == teacher.prompts
    assert student.max_seq_length == teacher.max_seq_length
    assert sum(isinstance(module, Normalize) for module in student) == 1
    np.testing.assert_array_equal(teacher.encode(TEXTS[:20]), before)
    save_student(student, tmp_path / "student", False)
    loaded = load(tmp_path / "student")
    np.testing.assert_allclose(loaded.encode(TEXTS), student.encode(TEXTS), atol=1e-5)


def test_the_teachers_vectors_of_tokens_are_not_trained(case, tmp_path):
    student, _ = case(tmp_path)
    kept, trained = dict(case.teacher.named_parameters()), dict(student.named_parameters())
    same = {name for name, weight in trained.items() if not weight.requires_grad}
    assert [".".join(name.split(".")[-2:]) for name in same] == ["word_embeddings.weight"]
    assert all(torch.equal(trained[name], kept[name]) for name in same)


def test_all_layers_and_the_projection_give_the_projected_teacher(teacher, matrix, vectors):
    for config in (replace(CONFIG, layers=2), replace(CONFIG, layers=None, student="projection")):
        student = build_student(config, teacher, matrix, TEXTS)
        np.testing.assert_allclose(student.encode(TEXTS), project(matrix, vectors), atol=1e-5)


def test_a_named_student_is_another_model_and_a_random_projection(teacher, matrix, tmp_path):
    other = load(build(KINDS["t5"], tmp_path))
    config = replace(CONFIG, student="named", student_model="other", layers=None)
    student = build_student(config, teacher, matrix, TEXTS, student_model=other)
    assert student.get_embedding_dimension() == WIDTH
    again = build_student(config, teacher, matrix, TEXTS, student_model=other)
    np.testing.assert_array_equal(student.encode(TEXTS), again.encode(TEXTS))
    weight = next(
        module for module in reversed(list(student)) if isinstance(module, Dense)
    ).linear.weight
    gram = (weight @ weight.T).detach().numpy()
    np.testing.assert_allclose(gram / gram[0, 0], np.eye(WIDTH), atol=1e-5)
    with pytest.raises(ModelError):
        build_student(config, teacher, matrix, TEXTS)


def test_a_static_student_holds_the_teachers_vector_of_each_token(teacher, matrix):
    alone = token_vectors(teacher, "tiny")
    tokens = teacher.tokenizer.convert_ids_to_tokens(range(len(alone)))
    at = tokens.index("fox") if "fox" in tokens else tokens.index("query")
    expected = teacher.encode([tokens[at]], normalize_embeddings=True)[0]
    np.testing.assert_allclose(alone[at], expected, atol=1e-5)
    config = replace(CONFIG, student="static", layers=None)
    student = build_student(config, teacher, matrix, TEXTS, vectors_of_tokens=alone)
    centred = alone - alone.mean(axis=0)
    np.testing.assert_allclose(
        student.encode([tokens[at]])[0], project(matrix, centred[at : at + 1])[0], atol=1e-5
    )
    static: Any = student[0]
    table = static.embedding.weight.detach().norm(dim=1)
    counted = [static.tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
    common = np.bincount(np.concatenate(counted)).argmax()
    unseen = next(token for token in range(5, len(alone)) if all(token not in ids for ids in counted))
    assert table[common] < table[unseen]


def test_a_model_without_layers_to_choose_from_is_refused(teacher, matrix):
    static = build_student(replace(CONFIG, student="static", layers=None), teacher, matrix, TEXTS)
    with pytest.raises(ModelError, match="layers"):
        build_student(CONFIG, static, np.eye(WIDTH, dtype=np.float32), TEXTS)
    with pytest.raises(ModelError, match="2 layers"):
        build_student(replace(CONFIG, layers=3), teacher, matrix, TEXTS)


@pytest.mark.parametrize("kind", ["layers", "static", "projection"])
def test_half_precision_halves_the_folder_and_keeps_the_vectors(kind, teacher, matrix, tmp_path):
    config = replace(CONFIG, student=kind, layers=1 if kind == "layers" else None)
    student = build_student(config, teacher, matrix, TEXTS)
    save_student(student, tmp_path / "whole", False)
    save_student(student, tmp_path / "half", True)
    assert bytes_on_disk(tmp_path / "half") < 0.6 * bytes_on_disk(tmp_path / "whole")
    loaded = load(tmp_path / "half")
    assert cosines(loaded.encode(TEXTS).astype(np.float32), student.encode(TEXTS)).min() > 0.9999
    assert loaded.prompts == teacher.prompts


def test_a_model_card_says_teacher_data_recipe_and_figures():
    card = model_card(CONFIG, {"texts": 3, "a": {"b": 0.123456}})
    assert card.startswith("---\nlibrary_name: sentence-transformers\n")
    for said in ("tiny", "a.txt", "| b | 0.1235 |", "| learning_rate | 0.003 |"):
        assert said in card


# Losses.

ROWS = st.tuples(st.integers(2, 6), st.integers(4, 9), st.integers(0, 2**31)).map(
    lambda drawn: [
        np.random.default_rng([drawn[2], side]).normal(size=drawn[:2]).astype(np.float32)
        for side in range(4)
    ]
)


@laws(max_examples=30, deadline=None)
@given(ROWS, st.floats(0, 1), st.floats(0, 5), st.floats(0, 1), st.sampled_from([(), (2,), (1, 3)]))
def test_the_loss_is_the_formula(rows, alpha, similarity_weight, task_weight, widths):
    student, teacher, queries, positives = rows
    targets = unit(teacher)
    wanted, parts = 0.0, []
    for width in (*widths, student.shape[1]):
        s, y = student[:, :width], unit(targets[:, :width])
        parts.append(
            [
                ((s - y) ** 2).sum(axis=1).mean(),
                1 - cosines(s, y).mean(),
                ((unit(s) @ unit(s).T - y @ y.T) ** 2).mean(),
            ]
        )
    mse, cosine, similarity = np.mean(parts, axis=0)
    distilled = alpha * mse + (1 - alpha) * cosine + similarity_weight * similarity
    logits = unit(queries) @ unit(positives).T / 0.05
    logits -= logits.max(axis=1, keepdims=True)
    task = -np.mean(np.diag(logits) - np.log(np.exp(logits).sum(axis=1)))
    wanted = (1 - task_weight) * distilled + task_weight * task
    loss = DistillationLoss(alpha, task_weight, similarity_weight, widths)
    pairs = torch.from_numpy(queries), torch.from_numpy(positives)
    terms = loss(torch.from_numpy(student), torch.from_numpy(targets), pairs)
    assert terms.numbers()["loss"] == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    assert terms.numbers()["mse"] == pytest.approx(mse, rel=1e-4)
    alone = loss(torch.from_numpy(student), torch.from_numpy(targets))
    assert alone.total.item() == pytest.approx(distilled, rel=1e-3, abs=1e-5)
    assert alone.task.item() == 0


def test_a_perfect_student_has_no_loss():
    targets = torch.nn.functional.normalize(torch.randn(5, 8), dim=1)
    terms = DistillationLoss(0.5, 0.0, 2.0)(targets, targets)
    assert all(abs(value) < 1e-6 for value in terms.numbers().values())


def test_alpha_changes_the_direction_of_the_gradient():
    targets = torch.nn.functional.normalize(torch.randn(5, 8), dim=1)

    def gradient(alpha, *, normalized):
        output: Any = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
        given = torch.nn.functional.normalize(output, dim=1) if normalized else output
        DistillationLoss(alpha)(given, targets).total.backward()
        return torch.nn.functional.normalize(output.grad.flatten(), dim=0)

    assert gradient(0.0, normalized=False) @ gradient(1.0, normalized=False) < 0.9
    # On what is already normalised, which is the trap, they are parallel.
    assert gradient(0.0, normalized=True) @ gradient(1.0, normalized=True) > 0.9999


def test_a_query_nearer_to_its_own_positive_costs_less():
    queries = torch.eye(4)
    assert contrastive(queries, queries) < 0.01 < contrastive(queries, queries.roll(1, 0))


# Batches and the schedule.


@given(st.lists(st.integers(0, 300), min_size=1, max_size=200), st.integers(1, 40), st.integers(0, 99))
def test_every_text_is_in_an_epoch_exactly_once(lengths, batch_size, seed):
    batches = epoch_order(lengths, batch_size, seed, 0)
    assert sorted(at for batch in batches for at in batch) == list(range(len(lengths)))
    assert all(0 < len(batch) <= batch_size for batch in batches)
    assert len(batches) == -(-len(lengths) // batch_size)
    assert batches == epoch_order(lengths, batch_size, seed, 0)


def test_epochs_differ_and_a_batch_holds_texts_of_similar_length():
    lengths = np.random.default_rng(1).integers(1, 100, size=500).tolist()
    first, second = (epoch_order(lengths, 10, 7, epoch) for epoch in (0, 1))
    assert first != second
    assert np.mean([np.ptp([lengths[at] for at in batch]) for batch in first]) < 5


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_sentence_transformers_makes(kind, tmp_path):
    model = load(build(KINDS[kind], tmp_path))
    reader = StudentTokenizer(model)
    for text in (
        *TEXTS[:5],
        PROSE * 9,
    ):  # one by one: padding is on the right, whatever the tokenizer says
        ours, theirs = reader.features(reader.ids([text])), model.preprocess([text])
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize(
    "name", ["default prompt", "default prompt outside of pooling", "width of its own"]
)
def test_a_student_learns_what_it_will_be_served_as(name, tmp_path):
    teacher = load(ODD[name].build(tmp_path))
    encoder = load_engine(Settings(model=str(tmp_path / "model"), engine="torch", dtype="float32"))
    vectors = embed_locally(encoder, TEXTS)
    matrix = svd(vectors, 8)
    for kind in ("layers", "projection", "static"):
        config = replace(CONFIG, student=kind, layers=2 if kind == "layers" else None, output_dim=8)
        student = build_student(config, teacher, matrix, TEXTS)
        reader = StudentTokenizer(student)
        with torch.no_grad():
            found = outputs(student, reader.features(reader.ids(TEXTS[:1]))).numpy()
        served = student.encode(TEXTS[:1])
        assert cosines(found, served) == pytest.approx(1, abs=1e-5)
        if kind != "static":
            assert cosines(served, project(matrix, vectors[:1])) == pytest.approx(1, abs=1e-4)


@given(st.integers(2, 500), st.floats(0, 0.9))
def test_the_learning_rate_rises_to_its_peak_and_falls_to_nothing(steps, warmup_share):
    shares = [learning_rate_share(step, steps, warmup_share) for step in range(steps)]
    assert all(0 < share <= 1 for share in shares)
    peak = int(np.argmax(shares))
    assert shares[: peak + 1] == sorted(shares[: peak + 1])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)
    assert learning_rate_share(steps, steps, warmup_share) == 0 or steps == round(steps * warmup_share)


# Training.


def watch_nothing(progress):
    del progress


class StoppedError(Exception):
    """What a test ends a run with."""


class Case:
    """All arguments of a run; another student each time."""

    def __init__(self, teacher, matrix, vectors, config=CONFIG):
        self.teacher, self.matrix, self.config = teacher, matrix, config
        self.targets = project(matrix, vectors)
        self.pairs = [(TEXTS[at], TEXTS[at + 1]) for at in range(0, 40, 2)]

    def __call__(self, folder, on_step=watch_nothing, **named):
        student = build_student(self.config, self.teacher, self.matrix, TEXTS[20:])
        data = (TEXTS[20:], self.targets[20:], TEXTS[:20], self.targets[:20], self.pairs)
        trained = train(student, *data, self.config, Path(folder), on_step=on_step, **named)
        return student, trained


@pytest.fixture(scope="module")
def case(teacher, matrix, vectors):
    return Case(teacher, matrix, vectors)


@pytest.fixture(scope="module")
def short_case(teacher, matrix, vectors):
    """One of 13 steps, in place of 39."""
    return Case(teacher, matrix, vectors, replace(CONFIG, max_epochs=1))


def largest_difference(first, second):
    theirs = dict(second.named_parameters())
    return max(float((w - theirs[name]).detach().abs().max()) for name, w in first.named_parameters())


@pytest.mark.parametrize("kind", ["layers", "static"])
def test_a_student_comes_nearer_to_its_teacher(kind, teacher, matrix, vectors, tmp_path):
    config = replace(
        CONFIG, student=kind, layers=1 if kind == "layers" else None, max_epochs=8, eval_steps=3
    )
    case = Case(teacher, matrix, vectors, config)
    fresh = build_student(config, teacher, matrix, TEXTS[20:])
    before = cosines(fresh.encode(TEXTS[:20]), case.targets[:20]).mean()
    seen: list[TrainingProgress] = []
    student, trained = case(tmp_path / "not" / "there", seen.append)
    after = cosines(student.encode(TEXTS[:20]), case.targets[:20]).mean()
    assert after > before + 0.02
    assert trained.quality == pytest.approx(after, abs=0.01)
    assert trained.quality == max(point["quality"] for point in trained.curves)
    assert [progress.step for progress in seen] == list(range(1, trained.steps + 1))
    assert seen[-1].left_s == 0
    assert seen[0].quality is None
    assert seen[-1].best_quality == trained.quality
    assert {"step", "quality", "loss", "mse", "cosine"} <= trained.curves[0].keys()
    json.dumps(trained.curves)


@pytest.mark.parametrize("task_weight", [0.0, 0.3])
def test_a_run_that_is_stopped_three_times_ends_as_one_that_is_not(case, task_weight, tmp_path):
    if task_weight:
        case = Case(
            case.teacher, case.matrix, case.teacher.encode(TEXTS, normalize_embeddings=True),
            replace(CONFIG, task_weight=task_weight, pairs="pairs.jsonl"),
        )  # fmt: skip
    undisturbed, expected = case(tmp_path / "whole")
    stops = sorted(np.random.default_rng(3).choice(np.arange(2, 35), size=3, replace=False).tolist())
    steps = []
    for stop in stops:

        def stopping(progress, stop=stop):
            steps.append(progress.step)
            if progress.step == stop:
                raise StoppedError

        with pytest.raises(StoppedError):
            case(tmp_path / "stopped", stopping)
    student, found = case(tmp_path / "stopped", lambda progress: steps.append(progress.step))
    assert steps == list(range(1, expected.steps + 1)), "a checkpoint is written when it is stopped"
    assert largest_difference(student, undisturbed) <= 1e-6
    assert found.curves == expected.curves
    assert (found.quality, found.steps) == (expected.quality, expected.steps)


def test_a_finished_run_is_not_trained_again(short_case, tmp_path):
    first, trained = short_case(tmp_path)
    again, found = short_case(tmp_path, pytest.fail)
    assert found == trained
    assert largest_difference(first, again) == 0


def test_checkpoints_of_another_recipe_or_of_other_texts_are_not_read(short_case, tmp_path, caplog):
    short_case(tmp_path)
    vectors = short_case.teacher.encode(TEXTS, normalize_embeddings=True)
    other = Case(short_case.teacher, short_case.matrix, vectors, replace(short_case.config, alpha=0.9))
    fresh, expected = other(tmp_path / "fresh")
    student, found = other(tmp_path)
    assert "starting anew" in caplog.text
    assert found.curves == expected.curves
    assert largest_difference(student, fresh) == 0
    caplog.clear()
    other.pairs = other.pairs[1:]
    other(tmp_path)
    assert "starting anew" in caplog.text


def test_a_run_goes_on_where_targets_differ_in_their_last_bits(short_case, tmp_path, caplog):
    short_case(tmp_path)
    again = copy.copy(short_case)
    again.targets = np.nextafter(short_case.targets, np.float32(2))
    assert not np.array_equal(again.targets, short_case.targets)
    again(tmp_path, pytest.fail)
    assert "starting anew" not in caplog.text


def test_a_damaged_checkpoint_yields_to_the_one_before(short_case, tmp_path):
    def stopping(progress):
        if progress.step == 9:
            raise StoppedError

    with pytest.raises(StoppedError):
        short_case(tmp_path, stopping)
    (tmp_path / "checkpoint-000000009" / "tensors.safetensors").write_bytes(b"")
    steps = []
    short_case(tmp_path, lambda progress: steps.append(progress.step))
    assert steps[0] == 9, "from the checkpoint of step 8"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_training_that_diverges_stops_with_its_figures_and_keeps_its_checkpoints(bad, case, tmp_path):
    def stopping(progress):
        if progress.step == 9:
            raise StoppedError

    with pytest.raises(StoppedError):
        case(tmp_path, stopping)
    best = checkpoints.read_tensors(tmp_path / "best.safetensors")
    diverging = copy.copy(case)
    diverging.targets = np.full_like(case.targets, bad)
    with pytest.raises(TrainingDivergedError) as told:
        diverging(tmp_path)
    error = told.value
    assert (error.step, error.steps, error.kept_step) == (10, 39, 9)
    assert re.fullmatch(r"loss (nan|inf), gradient norm (nan|inf), first loss [0-9.]+", error.figures)
    assert error.learning_rate == CONFIG.learning_rate
    assert "checkpoint of step 9 is kept" in str(error)
    assert "Lower learning_rate, which is 0.003" in str(error)
    found = checkpoints.latest(tmp_path)
    assert found is not None
    assert found.step == 9
    for name, tensor in checkpoints.read_tensors(tmp_path / "best.safetensors").items():
        np.testing.assert_array_equal(tensor, best[name])
    steps = []
    case(tmp_path, lambda progress: steps.append(progress.step))
    assert steps[0] == 10, "the same recipe goes on from there"


def test_a_loss_that_grows_beyond_all_measure_is_a_divergence_too(case, tmp_path):
    config = replace(CONFIG, learning_rate=1.0, warmup_share=0.0, max_epochs=20)
    vectors = case.teacher.encode(TEXTS, normalize_embeddings=True)
    with pytest.raises(TrainingDivergedError) as told:
        Case(case.teacher, case.matrix, vectors, config)(tmp_path)
    loss = float(told.value.figures.split(",")[0].removeprefix("loss "))
    assert loss > trainer.MOST_GROWTH


def test_a_first_loss_that_is_no_number_is_blamed_on_the_weights(case, tmp_path):
    diverging = copy.copy(case)
    diverging.targets = np.full_like(case.targets, np.nan)
    with pytest.raises(TrainingDivergedError, match="Not even the first loss") as told:
        diverging(tmp_path)
    assert told.value.kept_step is None
    assert checkpoints.latest(tmp_path) is None


def test_a_quality_that_is_no_number_is_a_divergence(case, tmp_path, monkeypatch):
    qualities(monkeypatch, iter([0.5, np.nan]))
    with pytest.raises(TrainingDivergedError, match="cosine on held-out texts nan") as told:
        case(tmp_path)
    assert told.value.step == 10


def qualities(monkeypatch, values: Iterator[float]):
    monkeypatch.setattr(trainer._Training, "_quality", lambda _: next(values))


def test_it_ends_above_the_threshold(case, tmp_path, monkeypatch):
    qualities(monkeypatch, iter([0.5, 0.98, 0.99]))
    _, trained = case(tmp_path)
    assert (trained.quality, trained.steps) == (0.99, 15), "0.98 is not above 0.98"


def test_it_ends_when_patience_does_and_the_best_weights_are_restored(case, tmp_path, monkeypatch):
    case = Case(
        case.teacher, case.matrix, case.teacher.encode(TEXTS, normalize_embeddings=True),
        replace(CONFIG, patience=2),
    )  # fmt: skip
    qualities(monkeypatch, iter([0.5, 0.7, 0.6, 0.7, 0.9]))
    student, trained = case(tmp_path)
    assert (trained.quality, trained.steps) == (0.7, 20)
    best = checkpoints.read_tensors(tmp_path / "best.safetensors")
    for name, weight in student.named_parameters():
        if name in best:
            np.testing.assert_array_equal(weight.detach().numpy(), best[name])
    last: Any = checkpoints.latest(tmp_path)
    assert last.step == 20
    assert any(not np.array_equal(last.tensors[f"model/{name}"], array) for name, array in best.items())


def test_a_pause_counts_neither_as_speed_nor_towards_a_checkpoint(case, tmp_path, monkeypatch):
    case = Case(
        case.teacher, case.matrix, case.teacher.encode(TEXTS, normalize_embeddings=True),
        replace(CONFIG, checkpoint_steps=10**6, checkpoint_minutes=1.0),
    )  # fmt: skip
    now, seen, written = [0.0], [], []
    monkeypatch.setattr(trainer._Training, "_save", lambda run: written.append(run.state.step))

    def clock():
        now[0] += 1.0
        return now[0]

    def paused(progress):
        seen.append(progress)
        now[0] += 10_000

    _, trained = case(tmp_path, paused, clock=clock)
    assert trained.seconds == pytest.approx(trained.steps)
    assert all(progress.texts_per_s == pytest.approx(100 / 13, rel=0.1) for progress in seen)
    assert seen[0].left_s == pytest.approx(trained.steps - 1)
    assert set(written) == {trained.steps}


def test_nothing_to_learn_from_is_refused(case, tmp_path):
    rows = case.targets
    student = build_student(CONFIG, case.teacher, case.matrix, TEXTS)
    for data in (
        ([], rows[:0], TEXTS[:2], rows[:2]),
        (TEXTS[:2], rows[:2], [], rows[:0]),
        (TEXTS[:2], rows[:3], TEXTS[:2], rows[:2]),
    ):
        with pytest.raises(ValueError):
            train(student, *data, [], CONFIG, tmp_path, on_step=watch_nothing)


# Speed.


def test_the_speed_up_is_the_median_of_pairwise_ratios():
    now, theirs = [0.0], iter([100.0, 3.0, 30.0, 4.0])

    def student(texts):
        now[0] += 1.0

    def teacher(texts):
        now[0] += next(theirs)

    assert speed_ratio(teacher, student, ["a"], 3, lambda: now[0]) == 4.0
