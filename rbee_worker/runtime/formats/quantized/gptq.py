"""GPTQ and AWQ: integers packed into words of 32 bits, with a scale and a zero point for each group of inputs.

GPTQ packs along the inputs: ``qweight`` is int32 [inputs * bits / 32, outputs]. Its first version stores every zero
point minus one. ``g_idx`` names the group of each input; with ``desc_act`` the inputs of a group are not neighbors.
AWQ's ``gemm`` layout packs eight outputs into a word, in the order 0, 2, 4, 6, 1, 3, 5, 7. In both, ``scales`` is
[groups, outputs], and ``qzeros`` is packed along the outputs.
Layouts: https://github.com/AutoGPTQ/AutoGPTQ (``qlinear_cuda_old.py``), https://github.com/casper-hansen/AutoAWQ
(``awq/utils/packing_utils.py``).
"""

from dataclasses import dataclass

from rbee_worker.runtime.formats.quantized.options import QuantizationReader
from rbee_worker.runtime.formats.quantized.tensor import FLOATS, WORD_BITS, Grouped, Stored, groups_of

_HARMLESS = frozenset(
    {
        # how the weights were found
        *("damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "dataset", "tokenizer", "mse"),
        *("model_seqlen", "batch_size", "pad_token_id", "act_group_aware", "hyb_act", "cache_block_outputs", "sym"),
        *("block_name_to_quantize", "modules_in_block_to_quantize", "module_name_preceding_first_block", "meta"),
        # for programs that run them
        *("backend", "use_exllama", "exllama_config", "disable_exllama", "use_cuda_fp16", "max_input_length"),
        *("model_name_or_path", "model_file_base_name", "do_fuse", "modules_to_fuse", "fuse_max_seq_len"),
        # the tensors show it
        "lm_head",
    }
)


@dataclass(frozen=True, slots=True)
class GPTQFormat:
    """Method ``gptq``.

    Attributes:
        bits: of a weight.
        group: inputs that share a scale; -1: all of a row.
        ordered: whether ``g_idx`` is required (``desc_act``), because the inputs of a group are not neighbors.
        zero_offset: added to stored zero points.
    """

    bits: int
    group: int
    ordered: bool
    zero_offset: int

    def present(self, stored: Stored) -> None:
        """See :class:`Format`."""
        for module in stored.modules("qweight"):
            self._gather(stored, module)

    def _gather(self, stored: Stored, module: str) -> None:
        per_word = WORD_BITS // self.bits
        weight = stored.take(module, "qweight", ("I32",), check=_is_matrix)
        inputs, outputs = weight.shape[0] * per_word, weight.shape[1]
        group = self.group if self.group > 0 else inputs
        groups = -(-inputs // group)
        parts = {
            "weight": weight,
            "scale": stored.take(module, "scales", FLOATS, (groups, outputs)),
            "zero": stored.take(module, "qzeros", ("I32",), (groups, -(-outputs // per_word))),
        }
        if self.ordered or stored.has(module, "g_idx"):
            parts["order"] = stored.take(module, "g_idx", ("I32", "I64"), (inputs,))
        ordered = ", reordered" if self.ordered else ""
        scheme = Grouped(
            what=f"gptq {self.bits}-bit, {groups_of(self.group)}{ordered}",
            packing="columns",
            bits=self.bits,
            zeros="rows",
            zero_offset=self.zero_offset,
            block=(1, group),
            transposed=True,
        )
        stored.put(module, (outputs, inputs), scheme, parts)


@dataclass(frozen=True, slots=True)
class AWQFormat:
    """Method ``awq``. ``group``: inputs that share a scale; -1: all of a row."""

    group: int

    def present(self, stored: Stored) -> None:
        """See :class:`Format`."""
        for module in stored.modules("qweight"):
            weight = stored.take(module, "qweight", ("I32",), check=_is_matrix)
            inputs, outputs = weight.shape[0], weight.shape[1] * 8
            group = self.group if self.group > 0 else inputs
            groups = -(-inputs // group)
            parts = {
                "weight": weight,
                "scale": stored.take(module, "scales", FLOATS, (groups, outputs)),
                "zero": stored.take(module, "qzeros", ("I32",), (groups, weight.shape[1])),
            }
            scheme = Grouped(
                what=f"awq 4-bit, {groups_of(self.group)}",
                packing="awq",
                bits=4,
                zeros="awq",
                block=(1, group),
                transposed=True,
            )
            stored.put(module, (outputs, inputs), scheme, parts)


def read_gptq(options: QuantizationReader) -> GPTQFormat:
    """The format that the options of ``gptq`` describe.

    Raises:
        ModelUnsupported: an option that is not handled.
        ModelMalformed: an option is missing or of the wrong type.
    """
    bits, group = options.bits("bits", (4, 8)), options.group_size("group_size")
    ordered = options.boolean("desc_act", default=False)
    default = options.one_of("format", "gptq", ("gptq", "gptq_v2"))
    version = options.one_of("checkpoint_format", default, ("gptq", "gptq_v2"))
    options.one_of("pack_dtype", "int32", ("int32",))
    options.refuse_others(_HARMLESS)
    return GPTQFormat(bits, group, ordered, 1 if version == "gptq" else 0)


def read_awq(options: QuantizationReader) -> tuple[AWQFormat, tuple[str, ...]]:
    """The format that the options of ``awq`` describe, and the modules that are not quantized.

    Raises:
        ModelUnsupported: an option that is not handled.
        ModelMalformed: an option is missing or of the wrong type.
    """
    options.bits("bits" if options.has("bits") else "w_bit", (4,))
    group = options.group_size("group_size" if options.has("group_size") else "q_group_size")
    if not options.boolean("zero_point", default=True):
        raise options.unsupported("zero_point", value=False, hint="Only checkpoints with zero points are read.")
    for key in ("version", "format"):
        options.one_of(key, "gemm", ("gemm",))
    if options.text("backend", "auto").lower() == "llm-awq":
        raise options.unsupported("backend", "llm-awq", "AutoAWQ's gemm layout is read.")
    ignored = options.names("modules_to_not_convert")
    options.refuse_others(_HARMLESS)
    return AWQFormat(group), ignored


def _is_matrix(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and all(shape)  # noqa: PLR2004
