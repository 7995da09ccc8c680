"""Every family and every rotary scaling against transformers: the same logits, the same greedy tokens."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from rbee_worker.config import GenerationRequest, SamplingParams
from rbee_worker.kernels.library import cpu_kernels, missing_reason
from rbee_worker.runtime.architecture.table import ARCHITECTURES, parse_config
from rbee_worker.runtime.engine.engine import Engine
from rbee_worker.runtime.engine.sequence import Sequence
from rbee_worker.runtime.inspection import inspect_model
from rbee_worker.runtime.loading.fit import weights_bytes
from rbee_worker.runtime.model.linear.cpu import cpu_features
from rbee_worker.runtime.source import resolve
from tests.engines import loaded
from tests.tiny import byte_tokenizer

from .families import CASES, PAGE, SIZES, Case, insert_table
from .test_int8 import FINEST
from .test_logits import logits_of, relative_error, transformer_of

LENGTHS = (1, 5, 33, 17, 16, 48, 24)
NEW_TOKENS = 32


def test_the_page_says_what_is_proven_here() -> None:
    page = PAGE.read_text("utf-8")
    assert insert_table(page) == page, "python -m tests.reference.families writes it"


def prompts_of(case: Case) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = [length for length in LENGTHS if case.shortest <= length <= case.longest] or [case.longest]
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]


def fill(case: Case) -> PreTrainedModel:
    """A random model of a case."""
    torch.manual_seed(0)
    model = case.build()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or "norm" in name:
            around = 1.0 if "norm" in name and name.endswith("weight") and not case.offset_norms else 0.0
            parameter.data.normal_(around, 0.3, generator=generator)
        else:
            parameter.data.normal_(0.0, 0.2, generator=generator)
    return model


def save(case: Case, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A random model of a case, saved by transformers, with a byte-level tokenizer beside it."""
    fill(case).to(dtype).save_pretrained(path)
    byte_tokenizer().save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def path_of(name: str) -> Path:
        if name not in made:
            made[name] = save(CASES[name], tmp_path_factory.mktemp("families") / "model")
        return made[name]

    return path_of


def reference(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()


def their_logits(model: PreTrainedModel, prompts: list[list[int]]) -> list[Tensor]:
    with torch.inference_mode():
        return [model(torch.tensor([prompt]), use_cache=False).logits[0].float() for prompt in prompts]


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens_are_the_reference_s(saved: Callable[[str], Path], name: str) -> None:
    case, path = CASES[name], saved(name)
    engine, theirs, prompts = loaded(path, max_context=case.context, prefill_chunk=8), reference(path), prompts_of(case)
    expected = their_logits(theirs, prompts)
    for chunk in (1000, 7):
        assert_logits(logits_of(transformer_of(engine), prompts, chunk), expected)
    assert_logits(logits_of(transformer_of(engine), prompts[:3], 1), expected[:3])
    for prompt, wanted in zip(prompts, expected, strict=True):
        assert_logits(logits_of(transformer_of(engine), [prompt]), [wanted])
    if case.generates:
        prompt = next(prompt for prompt in reversed(prompts) if case.crossing in {None, len(prompt)})
        assert_greedy(engine, theirs, prompt, min(NEW_TOKENS, case.longest - len(prompt)))


def assert_logits(ours: list[Tensor], expected: list[Tensor]) -> None:
    for mine, wanted in zip(ours, expected, strict=True):
        assert relative_error(mine, wanted) < 1e-4


def submit(engine: Engine, prompt: list[int], count: int) -> Sequence:
    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    return engine.submit(GenerationRequest(prompt_ids=tuple(prompt), sampling=sampling))


def assert_greedy(engine: Engine, theirs: PreTrainedModel, prompt: list[int], count: int) -> None:
    sequence = submit(engine, prompt, count)
    while not sequence.finished:
        engine.step()
    assert sequence.tokens[sequence.prompt_tokens :] == generated(theirs, prompt, count)


def generated(theirs: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


FAMILIES = {case.architecture: name for name, case in reversed(CASES.items())}
"""Of each architecture, its first case."""


def errors(path: Path, case: Case, dtype: str, **config: Any) -> float:
    """The relative error of all logits of all prompts, against transformers in float32."""
    prompts = prompts_of(case)
    ours = logits_of(transformer_of(loaded(path, dtype, max_context=case.context, **config)), prompts)
    return relative_error(torch.cat(ours), torch.cat(their_logits(reference(path), prompts)))


@pytest.mark.cpu_forms
@pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)
def test_sixteen_bits_err_no_more_than_the_reference_does(saved: Callable[[str], Path], name: str) -> None:
    case, path = CASES[name], saved(name)
    prompts = prompts_of(case)
    exact = torch.cat(their_logits(reference(path), prompts))
    for dtype in ("bfloat16", "float16"):
        theirs = relative_error(torch.cat(their_logits(reference(path, getattr(torch, dtype)), prompts)), exact)
        assert errors(path, case, dtype) < 1.5 * theirs, dtype


@pytest.mark.cpu_forms
@pytest.mark.skipif(cpu_kernels() is None, reason=f"the kernels do not run here: {missing_reason()}")
@pytest.mark.parametrize(
    "dtype",
    [
        "float16",
        pytest.param(
            "bfloat16",
            marks=pytest.mark.skipif(
                cpu_features().bf16_arithmetic, reason="a CPU that multiplies bfloat16 rounds activations to it"
            ),
        ),
    ],
)
@pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)
def test_the_kernels_round_nothing_of_sixteen_bits(name: str, dtype: str, tmp_path: Path) -> None:
    """The same weights, as they are by the kernels, and made float32 by torch."""
    case = CASES[name]
    path = save(case, tmp_path / "model", getattr(torch, dtype))
    transformer = transformer_of(loaded(path, dtype, max_context=case.context, kv_cache_dtype="float32"))
    assert transformer.form.native
    exact = logits_of(transformer_of(loaded(path, max_context=case.context)), prompts_of(case))
    assert_logits(logits_of(transformer, prompts_of(case)), exact)


@pytest.mark.cpu_forms
@pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)
def test_int8_errs_by_what_eight_bits_allow(saved: Callable[[str], Path], name: str) -> None:
    # Random weights have none of the slack of trained ones, and a token that goes to another expert is another token.
    allowed = 0.3 if "num_experts_per_tok" in CASES[name].changes else 0.12
    error = errors(saved(name), CASES[name], "float32", quantize="int8")
    assert 1e-3 < error < allowed * FINEST / (cpu_features().int8_levels or FINEST)


@pytest.mark.parametrize(
    "quantize",
    ["none", "int8", pytest.param("int4", marks=pytest.mark.skipif(cpu_kernels() is None, reason="needs the kernels"))],
)
@pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)
def test_what_is_needed_is_what_a_load_then_holds(saved: Callable[[str], Path], name: str, quantize: Any) -> None:
    held = transformer_of(loaded(saved(name), "float16", quantize=quantize))
    assert weights_bytes(held.config, held.form) == pytest.approx(held.nbytes, rel=0.02)


@pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)
def test_inspect_counts_what_transformers_counts(saved: Callable[[str], Path], name: str) -> None:
    case, found = CASES[name], inspect_model(resolve(str(saved(name))), None)
    assert found.architecture == case.architecture
    assert found.family == ARCHITECTURES[case.architecture].family
    assert found.parameters == sum(parameter.numel() for parameter in case.build().parameters())
    active = case.changes.get("num_experts_per_tok", 1) / case.changes.get(
        "num_experts", case.changes.get("num_local_experts", 1)
    )
    experts = sum(parameter.numel() for key, parameter in case.build().named_parameters() if ".experts." in key)
    assert found.active_parameters == found.parameters - round(experts * (1 - active))
    assert found.memory[2].weights_bytes == 4 * found.parameters
    assert found.memory[3].weights_bytes < found.memory[2].weights_bytes


@pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)
def test_defaults_are_those_of_transformers(name: str) -> None:
    """A config that says no more than its sizes means what transformers' own defaults make of it."""
    case = CASES[name]
    sizes = {key: value for key, value in SIZES.items() if key.startswith(("vocab", "hidden", "inter", "num_"))}
    sizes |= {"architectures": [case.architecture]}
    config = {key: value for key, value in case.config(**sizes).to_dict().items() if not key.endswith("token_id")}
    assert parse_config(sizes, file="short") == parse_config(config, file="long")


def test_sequences_of_either_rotation_run_side_by_side(saved: Callable[[str], Path]) -> None:
    """LongRoPE: within the trained context, beyond it, and grown beyond it; each as if it were alone."""
    path = saved("Phi3, longrope")
    engine, theirs = loaded(path, prefill_chunk=8), reference(path)
    prompts = prompts_of(CASES["Phi3, longrope"])
    common = prompts[2][:16]  # a block that several begin with, which is another one in the other rotation
    prompts += [[*common, 1], [*common, *range(30)], [*common, 2, 3]]
    sequences = [submit(engine, prompt, 12) for prompt in prompts]
    while not all(sequence.finished for sequence in sequences):
        engine.step()
    for sequence, prompt in zip(sequences, prompts, strict=True):
        assert sequence.tokens[len(prompt) :] == generated(theirs, prompt, 12)


def test_mxfp4_is_its_decoded_twin(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """The experts of gpt-oss in four bits, packed here by the published layout, against the same values in float32."""
    source = saved("GptOss")
    folder, twin = tmp_path / "packed", tmp_path / "twin"
    config = json.loads((source / "config.json").read_text())
    generator = torch.Generator().manual_seed(5)
    packed, plain = load_file(source / "model.safetensors"), load_file(source / "model.safetensors")
    for name in [name for name in plain if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = packed.pop(name).shape
        inputs = inputs // 32 * 32
        codes = torch.randint(0, 16, (experts, outputs, inputs // 32, 32), generator=generator)
        scales = torch.randint(122, 126, (experts, outputs, inputs // 32), generator=generator)
        packed[f"{name}_blocks"] = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
        packed[f"{name}_scales"] = scales.to(torch.uint8)
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes % 8] * (1 - 2 * (codes // 8))
        exact = values * 2.0 ** (scales[..., None] - 127)
        plain[name] = exact.flatten(-2).transpose(1, 2).contiguous()
    for path, tensors, quantization in ((folder, packed, {"quant_method": "mxfp4"}), (twin, plain, None)):
        path.mkdir()
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        (path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
        byte_tokenizer().save(str(path / "tokenizer.json"))
    prompts = prompts_of(CASES["GptOss"])
    ours = logits_of(transformer_of(loaded(folder)), prompts)
    assert_logits(ours, their_logits(reference(twin), prompts))
    assert inspect_model(resolve(str(folder)), None).parameters == inspect_model(resolve(str(twin)), None).parameters
