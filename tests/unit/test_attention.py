"""How attention is computed on which device: the specification's detection, decisions, and fallbacks."""

from collections.abc import Callable
from dataclasses import replace
from itertools import takewhile

import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks.cli.status import DeviceStatus, FleetStatus, precisions
from sutra_tasks.engines.attention import (
    AttentionCandidate,
    Implementation,
    ModelTraits,
    NoFaithfulAttention,
    attention_candidates,
    first_faithful,
    implementation_for_padding,
)
from sutra_tasks.engines.capability import GPUInfo, Hardware, detect
from sutra_tasks.health.states import DeviceState
from sutra_tasks.settings import ATTENTIONS, DTYPES
from tests.records import record

MINILM = ModelTraits(head_size=32)


def nvidia(major: int, minor: int, *, package: bool = True) -> Hardware:
    return Hardware(kind="cuda", capability=(major, minor), flash_attn=package)


def mi250(rocm: str, *, package: bool = True) -> Hardware:
    # As torch answers: a capability that would be a Hopper's.
    return Hardware(kind="cuda", hip=rocm, capability=(9, 0), architecture="gfx90a", flash_attn=package)


M2 = Hardware(kind="mps")
CPU = Hardware()
CPU_BF16 = Hardware(cpu_bf16=True)

CUDA = {"is_available": True, "provider": "CUDA"}
ROCM = {"provider": "ROCm", "architecture": "gfx90a"}


@pytest.mark.parametrize(
    ("hardware", "expected"),
    [
        pytest.param(nvidia(6, 1), {**CUDA, "is_available": False, "architecture": "Pascal"}, id="P40"),
        pytest.param(nvidia(7, 0), {**CUDA, "architecture": "Volta"}, id="V100"),
        pytest.param(nvidia(7, 5), {**CUDA, "architecture": "Turing"}, id="T4"),
        *(
            pytest.param(
                nvidia(*capability),
                {**CUDA, "architecture": architecture, "flash_v2_support": True},
                id=name,
            )
            for name, capability, architecture in [
                ("A100", (8, 0), "Ampere"),
                ("A10", (8, 6), "Ampere"),
                ("L4", (8, 9), "Ada"),
                ("H100", (9, 0), "Hopper"),
                ("B200", (10, 0), "Blackwell"),
                ("RTX5090", (12, 0), "Blackwell"),
                ("later", (14, 1), "compute capability 14.1"),
            ]
        ),
        pytest.param(mi250("4.5.2"), {**ROCM, "is_available": False}, id="MI250-4.5"),
        pytest.param(mi250("5.7.31921-d1770ee1b"), {**ROCM, "is_available": True}, id="MI250-5.7"),
        *(
            pytest.param(
                mi250(version),
                {**ROCM, "is_available": True, "flash_v2_support": True},
                id=f"MI250-{version}",
            )
            for version in ("6.2.41133-dd7f95766", "10.0.1")
        ),
        pytest.param(
            M2,
            {"is_available": True, "provider": "MPS", "architecture": "Apple Silicon",
             "neural_engine": True},
            id="M2",
        ),
        pytest.param(CPU, {"is_available": False, "provider": "CPU"}, id="CPU"),
    ],
)  # fmt: skip
def test_a_device_is_named_and_known_for_what_it_can(
    hardware: Hardware, expected: dict[str, object]
) -> None:
    capability = hardware.capability if hardware.hip is None else None
    assert detect(hardware) == GPUInfo(**{"compute_capability": capability, **expected})  # type: ignore[arg-type]


EXPECTED = [
    ("V100", nvidia(7, 0), Implementation.SDPA_EFFICIENT, "float16"),
    ("T4", nvidia(7, 5), Implementation.SDPA_EFFICIENT, "float16"),
    ("T4 alone", nvidia(7, 5, package=False), Implementation.SDPA_EFFICIENT, "float16"),
    *(
        case
        for name, capability in [("A100", (8, 0)), ("L4", (8, 9)), ("H100", (9, 0)), ("B200", (10, 0))]
        for case in [
            (name, nvidia(*capability), Implementation.FLASH_2, "bfloat16"),
            (f"{name} alone", nvidia(*capability, package=False), Implementation.SDPA_FLASH, "bfloat16"),
        ]
    ),
    ("MI250, ROCm 4.5", mi250("4.5"), Implementation.PLAIN, "bfloat16"),
    ("MI250, ROCm 5.7", mi250("5.7"), Implementation.PLAIN, "bfloat16"),
    ("MI250, ROCm 6.2", mi250("6.2"), Implementation.FLASH_2, "bfloat16"),
    ("MI250, ROCm 6.2 alone", mi250("6.2", package=False), Implementation.SDPA_FLASH, "bfloat16"),
    ("MI250, ROCm 10.0", mi250("10.0"), Implementation.FLASH_2, "bfloat16"),
    ("M2", M2, Implementation.METAL, "float32"),
    ("CPU", CPU, Implementation.CPU_FLASH, "float32"),
    ("CPU with bfloat16", CPU_BF16, Implementation.CPU_FLASH, "bfloat16"),
]


@pytest.mark.parametrize(("hardware", "path", "dtype"), [case[1:] for case in EXPECTED],
                         ids=[case[0] for case in EXPECTED])  # fmt: skip
def test_each_device_takes_the_best_it_can(hardware: Hardware, path: Implementation, dtype: str) -> None:
    best = attention_candidates(hardware, MINILM)[0]
    assert (best.implementation, best.dtype) == (path, dtype)


@pytest.mark.parametrize(
    ("traits", "path"),
    [
        (ModelTraits(head_size=256), Implementation.FLASH_2),
        (ModelTraits(head_size=264), Implementation.SDPA_EFFICIENT),
        (ModelTraits(head_size=36), Implementation.PLAIN),
        (replace(MINILM, flash=False), Implementation.SDPA_FLASH),
        (replace(MINILM, flash=False, position_bias=True), Implementation.SDPA_EFFICIENT),
        (ModelTraits(head_size=64, flash=False, sdpa=False), Implementation.PLAIN),
    ],
)
def test_a_model_gets_what_it_works_with(traits: ModelTraits, path: Implementation) -> None:
    best = attention_candidates(nvidia(9, 0), traits)[0]
    assert (best.implementation, best.dtype) == (path, "bfloat16")


@pytest.mark.parametrize(
    ("built_for", "path"),
    [
        (("sm_70", "sm_80"), Implementation.SDPA_EFFICIENT),
        (("compute_70",), Implementation.SDPA_EFFICIENT),
        (("sm_75", "sm_80", "sm_90a", "compute_120"), Implementation.PLAIN),
        (("something else",), Implementation.PLAIN),
    ],
)
def test_a_torch_without_kernels_for_a_gpu_is_told(
    built_for: tuple[str, ...], path: Implementation
) -> None:
    v100 = replace(nvidia(7, 0), built_for=built_for)
    best = attention_candidates(v100, MINILM)[0]
    assert best.implementation is path
    assert detect(v100).is_available == (path is not Implementation.PLAIN)
    built = f"this torch is built for {', '.join(built_for)}, not Volta (7.0)"
    assert any(built in reason for reason in best.ruled_out) == (path is Implementation.PLAIN)


@pytest.mark.parametrize(
    ("capability", "built_for", "is_built"),
    [
        ((8, 6), "sm_80", True),
        ((8, 0), "sm_86", False),
        ((9, 0), "sm_90a", True),
        ((9, 0), "sm_80", False),
        ((10, 3), "sm_100", True),
        ((10, 3), "sm_100a", False),
        ((12, 0), "sm_100", False),
        ((12, 0), "compute_90", True),
    ],
)
def test_binaries_run_on_later_chips_of_their_generation(
    capability: tuple[int, int], built_for: str, is_built: bool
) -> None:
    assert detect(replace(nvidia(*capability), built_for=(built_for,))).is_available == is_built


HARDWARE = st.builds(
    Hardware,
    kind=st.just("cuda"),
    capability=st.tuples(st.integers(5, 13), st.integers(0, 9)),
    hip=st.none() | st.sampled_from(["4.5", "5.7", "6.2.1", "10.0"]),
    architecture=st.sampled_from(["gfx90a", "gfx908", "gfx1100"]),
    flash_attn=st.booleans(),
) | st.sampled_from([M2, CPU, CPU_BF16])
TRAITS = st.builds(
    ModelTraits, st.integers(0, 512), st.booleans(), st.booleans(), position_bias=st.booleans()
)
WAYS = st.builds(
    attention_candidates,
    HARDWARE,
    TRAITS,
    attention=st.sampled_from(ATTENTIONS),
    dtype=st.sampled_from(DTYPES),
)


@laws(max_examples=80, deadline=None)
@given(ways=WAYS)
def test_the_last_resort_is_always_plain_attention_in_float32(
    ways: tuple[AttentionCandidate, ...],
) -> None:
    assert (ways[-1].implementation, ways[-1].dtype, ways[-1].on_trial) == (
        Implementation.PLAIN,
        "float32",
        False,
    )
    assert len({(way.implementation, way.dtype) for way in ways}) == len(ways)


@laws(max_examples=80, deadline=None)
@given(ways=WAYS)
def test_no_padded_batch_goes_through_cudas_flash_kernel(ways: tuple[AttentionCandidate, ...]) -> None:
    assert Implementation.SDPA_FLASH not in {
        implementation_for_padding(way.implementation) for way in ways
    }
    # What padded batches take instead is among the ways, should it be all that works.
    paths = {(way.implementation, way.dtype) for way in ways}
    assert {(implementation_for_padding(path), dtype) for path, dtype in paths} <= paths


@laws(max_examples=100, deadline=None)
@given(
    hardware=HARDWARE, traits=TRAITS, asked=st.sampled_from(ATTENTIONS), dtype=st.sampled_from(DTYPES)
)
def test_flash_kernels_run_only_where_they_can(
    hardware: Hardware, traits: ModelTraits, asked: str, dtype: str
) -> None:
    for way in attention_candidates(hardware, traits, attention=asked, dtype=dtype):
        if way.implementation in (Implementation.FLASH_2, Implementation.SDPA_FLASH):
            assert hardware.capability is not None
            assert hardware.capability >= (8, 0) or hardware.hip is not None
            assert detect(hardware).flash_v2_support
            assert way.dtype in ("float16", "bfloat16")
            assert traits.head_size in range(8, 257, 8)
            assert not traits.position_bias
        if way.implementation is Implementation.FLASH_2:
            assert hardware.flash_attn
            assert traits.flash
            assert asked in ("auto", "flash_attention_2")
        elif way.implementation is not Implementation.PLAIN:
            assert traits.sdpa
            assert asked != "eager"


@laws(max_examples=50, deadline=None)
@given(hardware=HARDWARE, dtype=st.sampled_from(DTYPES))
def test_a_precision_that_was_asked_for_comes_first(hardware: Hardware, dtype: str) -> None:
    first = attention_candidates(hardware, MINILM, dtype=dtype)[0]
    assert dtype in ("auto", first.dtype)
    assert first.on_trial == (dtype == "auto" and hardware.cpu_bf16)


@pytest.mark.parametrize(
    ("hardware", "asked", "reasons"),
    [
        (nvidia(9, 0), "auto", []),
        (CPU_BF16, "auto", []),
        (nvidia(7, 5), "auto", ["flash_attention_2: needs compute capability 8.0, this is Turing (7.5)",
                                "sdpa_flash: needs compute capability 8.0, this is Turing (7.5)"]),
        (nvidia(8, 0, package=False), "auto",
         ["flash_attention_2: the package is not installed: pip install 'sutra-tasks[gpu]'"]),
        (nvidia(9, 0), "sdpa", ["flash_attention_2: SUTRA_ATTENTION is sdpa"]),
        (CPU, "eager", ["bfloat16: this processor does not compute it itself",
                        "cpu_flash: SUTRA_ATTENTION is eager"]),
        (CPU_BF16, "flash_attention_2", ["flash_attention_2: there is no GPU it runs on"]),
        (mi250("5.7"), "sdpa", ["flash_attention_2: SUTRA_ATTENTION is sdpa",
                                "sdpa_flash: needs ROCm 6.0 on CDNA 2, this is ROCm 5.7 on gfx90a",
                                "sdpa_efficient: ROCm 5.7 on gfx90a is too old for it"]),
    ],
)  # fmt: skip
def test_a_choice_says_why_it_is_no_better_one(
    hardware: Hardware, asked: str, reasons: list[str]
) -> None:
    assert list(attention_candidates(hardware, MINILM, attention=asked)[0].ruled_out) == reasons


# What a probe shows.


def failing(
    *paths: Implementation, in_dtypes: str = "float16 bfloat16 float32"
) -> Callable[[AttentionCandidate], str | None]:
    return lambda way: "no" if way.implementation in paths and way.dtype in in_dtypes else None


@pytest.mark.parametrize(
    ("hardware", "broken", "path", "dtype", "reason"),
    [
        (nvidia(9, 0), (), Implementation.FLASH_2, "bfloat16", ""),
        (nvidia(9, 0), (Implementation.FLASH_2,), Implementation.SDPA_FLASH, "bfloat16",
         "flash_attention_2 in bfloat16: no"),
        (nvidia(9, 0), tuple(Implementation)[:3], Implementation.PLAIN, "bfloat16",
         "; ".join(f"{path} in bfloat16: no" for path in list(Implementation)[:3])),
        (CPU, (Implementation.CPU_FLASH,), Implementation.PLAIN, "float32",
         "bfloat16: this processor does not compute it itself; cpu_flash in float32: no"),
    ],
)  # fmt: skip
def test_what_fails_its_probe_gives_way_to_the_next(
    hardware: Hardware, broken: tuple[Implementation, ...], path: Implementation, dtype: str, reason: str
) -> None:
    way, choice = first_faithful(attention_candidates(hardware, MINILM), failing(*broken))
    assert (way.implementation, way.dtype) == (choice.implementation, choice.dtype) == (path, dtype)
    assert choice.reason == reason


def test_a_model_that_overflows_half_precision_runs_in_float32() -> None:
    ways = attention_candidates(nvidia(7, 5), MINILM)
    way, _ = first_faithful(ways, failing(*Implementation, in_dtypes="float16"))
    assert (way.implementation, way.dtype) == (Implementation.SDPA_EFFICIENT, "float32")


def test_a_precision_on_trial_has_one_trial() -> None:
    tried: list[AttentionCandidate] = []

    def prove(way: AttentionCandidate) -> str | None:
        tried.append(way)
        return "0.98 times as fast as float32" if way.on_trial else None

    _, choice = first_faithful(attention_candidates(CPU_BF16, MINILM), prove)
    assert [(way.implementation, way.dtype) for way in tried] == [
        (Implementation.CPU_FLASH, "bfloat16"),
        (Implementation.CPU_FLASH, "float32"),
    ]
    assert choice.dtype == "float32"
    assert choice.reason == "cpu_flash in bfloat16: 0.98 times as fast as float32"


@laws(max_examples=50, deadline=None)
@given(ways=WAYS, broken=st.sets(st.sampled_from(Implementation)))
def test_the_first_that_holds_is_chosen(
    ways: tuple[AttentionCandidate, ...], broken: set[Implementation]
) -> None:
    prove = failing(*broken)
    given_up = {way.dtype for way in ways if way.on_trial and prove(way)}
    if Implementation.PLAIN in broken and all(prove(way) for way in ways if way.dtype not in given_up):
        with pytest.raises(NoFaithfulAttention, match="plain in float32: no"):
            first_faithful(ways, prove)
        return
    way, _ = first_faithful(ways, prove)
    before = list(takewhile(lambda one: one != way, ways))
    assert all(prove(one) or one.dtype in given_up for one in before)
    assert not prove(way)


# What is told.


def test_a_status_names_devices_that_compute_alike_together() -> None:
    def device(name: str, **facts: str) -> DeviceStatus:
        said = record(name, attention_reason="", **facts)
        return DeviceStatus(name, live=True, state=DeviceState.HEALTHY, heartbeat_age_s=0, queued=0,
                            held=0, backlog_tokens=0, record=said)  # fmt: skip

    gpus = [device(f"gpu{n}", attention="sdpa_flash", dtype="bfloat16") for n in range(5)]
    devices = [*gpus, device("cpu0"), device("sim0", attention="none", dtype="")]
    unread = replace(devices[0], record=None)
    assert precisions(FleetStatus((*devices, unread), (), 0, 0)) == [
        "5 devices: sdpa_flash attention in bfloat16",
        "cpu0: cpu_flash attention in bfloat16",
    ]
    slow = replace(devices[0], record=record("gpu0", dtype="float32", attention_reason="slow"))
    assert precisions(FleetStatus((slow,), (), 0, 0)) == ["gpu0: cpu_flash attention in float32 (slow)"]
