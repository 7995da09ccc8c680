"""Reads rotary parameters from ``config.json``: from the older ``rope_scaling`` or the newer ``rope_parameters``."""

import math

from rbee_worker.errors import ModelMalformed, ModelUnsupported
from rbee_worker.escape import quoted
from rbee_worker.runtime.architecture.config import ROPE_KINDS, RopeScaling
from rbee_worker.runtime.untrusted import ConfigReader

_YARN_BETAS = (32.0, 1.0)


GLOBAL, LOCAL = "full_attention", "sliding_attention"
"""Kinds of layers, as ``layer_types`` and nested rotary parameters name them."""


def read_rope(
    config: ConfigReader, *, rotary_dim: int, theta: float, max_positions: int, local: bool = False
) -> RopeScaling:
    """The rotary embedding of the model.

    Args:
        config: the whole config.
        rotary_dim: how many dimensions of a head are rotated.
        theta: the base of the frequencies where the config has none.
        max_positions: the config's ``max_position_embeddings``.
        local: whether layers with windows have their own parameters. Those are not read here.

    Raises:
        ModelMalformed, ModelUnsupported: as :func:`scaling`.
    """
    theta = config.number("rope_theta", theta)
    # Phi-3 has this key outside of rope_scaling. There it takes precedence.
    original = config.optional_integer("original_max_position_embeddings")
    given = _given(config, local=local)
    if given is None:
        given = ConfigReader({}, config.file)
    return scaling(given, rotary_dim=rotary_dim, theta=theta, max_positions=max_positions, original=original)


def _given(config: ConfigReader, *, local: bool) -> ConfigReader | None:
    """The rotary parameters of the model; where layers with windows have their own, those of the other layers."""
    old, new = config.section("rope_scaling"), config.section("rope_parameters")
    given = new or old
    if given is None or GLOBAL not in given.values:
        return given
    if not local:
        raise ModelUnsupported(f"{config.file}: this family has one set of rotary parameters, not one for each layer.")
    # Where Gemma 3's config has rope_scaling too, it is for the layers without windows.
    return old or given.section(GLOBAL)


def rotary_size(config: ConfigReader, head_dim: int, *, partial: bool, local: bool = False) -> int:
    """How many dimensions of a head are rotated: ``head_dim`` times ``partial_rotary_factor``.

    Args:
        config: has the factor itself, or among its rotary parameters.
        head_dim: dimensions of a head.
        partial: whether the family may rotate fewer than all.
        local: as for :func:`read_rope`.

    Raises:
        ModelUnsupported: the factor is not 1, and the family always rotates all.
        ModelMalformed: the result is odd, zero, or more than ``head_dim``.
    """
    given = _given(config, local=local)
    factor = config.number("partial_rotary_factor", 1.0)
    if given is not None:
        factor = given.number("partial_rotary_factor", factor)
    if factor != 1.0 and not partial:
        raise ModelUnsupported(f"{config.file}: partial_rotary_factor {factor:g} is not supported; 1 is.")
    size = int(head_dim * factor)
    if size % 2 or not 0 < size <= head_dim:
        raise ModelMalformed(
            f"{config.file}: {size} of {head_dim} dimensions of a head would be rotated "
            f"(partial_rotary_factor {factor:g}); rotary embedding needs an even number of them."
        )
    return size


def scaling(
    given: ConfigReader, *, rotary_dim: int, theta: float, max_positions: int, original: int | None = None
) -> RopeScaling:
    """One set of rotary parameters.

    Args:
        given: ``rope_scaling``, ``rope_parameters``, or one of the objects in it; empty: no scaling.
        rotary_dim: how many dimensions of a head are rotated.
        theta: the base of the frequencies where ``given`` has none.
        max_positions: the config's ``max_position_embeddings``.
        original: the config's ``original_max_position_embeddings``; it comes before that of ``given``.

    Raises:
        ModelUnsupported: a kind of scaling, or a parameter, that is not handled.
        ModelMalformed: a parameter is missing or wrong.
    """
    kind = given.text("rope_type", given.text("type", "default"))
    if kind in {"su", "yarn"} and given.has("short_factor"):
        kind = "longrope"  # older Phi-3 configs use these names for it
    theta = given.number("rope_theta", theta)
    given.has("partial_rotary_factor")
    if kind not in ROPE_KINDS:
        raise ModelUnsupported(
            f"{given.file}: rotary scaling {quoted(kind)} is not supported.",
            hint=f"Supported: {', '.join(ROPE_KINDS)}.",
        )
    trained = given.optional_integer("original_max_position_embeddings")
    trained = original or trained
    if theta <= 1 or trained == 1 or (kind == "dynamic" and rotary_dim == 2):  # noqa: PLR2004 (one pair)
        raise ModelMalformed(f"{given.file}: rotary parameters that divide by zero: {quoted(dict(given.values))}.")
    if kind == "default":
        rope = RopeScaling(theta=theta)
        given.has("factor")  # has no meaning without scaling
    elif kind == "linear":
        rope = RopeScaling(kind="linear", theta=theta, factor=given.number("factor"))
    elif kind == "dynamic":
        rope = RopeScaling(
            kind="dynamic", theta=theta, factor=given.number("factor"), original_max_positions=max_positions
        )
    elif kind == "llama3":
        rope = _llama3(given, theta, trained)
    elif kind == "yarn":
        rope = _yarn(given, theta, trained or max_positions, max_positions)
    else:
        rope = _longrope(given, theta, trained or max_positions, max_positions, rotary_dim // 2)
    given.refuse_unread(f"rotary scaling {quoted(kind)}")
    return rope


def _llama3(given: ConfigReader, theta: float, trained: int | None) -> RopeScaling:
    low, high = given.number("low_freq_factor"), given.number("high_freq_factor")
    if low >= high:
        raise ModelMalformed(f"{given.file}: low_freq_factor {low:g} is not below high_freq_factor {high:g}.")
    return RopeScaling(
        kind="llama3",
        theta=theta,
        factor=given.number("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_positions=trained or given.integer("original_max_position_embeddings"),
    )


def _yarn(given: ConfigReader, theta: float, trained: int, max_positions: int) -> RopeScaling:
    """The default attention factor is ``0.1 ln(factor) + 1`` (arXiv:2309.00071).

    With ``mscale`` and ``mscale_all_dim`` it is ``(0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1)``,
    as in transformers.
    """
    factor = given.number("factor", max_positions / trained)
    mscale, mscale_all = given.optional_number("mscale"), given.optional_number("mscale_all_dim")
    if mscale and mscale_all:
        implied = _yarn_scale(factor, mscale) / _yarn_scale(factor, mscale_all)
    else:
        implied = _yarn_scale(factor, 1.0)
    return RopeScaling(
        kind="yarn",
        theta=theta,
        factor=factor,
        original_max_positions=trained,
        beta_fast=given.number("beta_fast", _YARN_BETAS[0]),
        beta_slow=given.number("beta_slow", _YARN_BETAS[1]),
        truncate=given.boolean("truncate", default=True),
        attention_factor=given.number("attention_factor", implied),
    )


def _yarn_scale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(given: ConfigReader, theta: float, trained: int, max_positions: int, pairs: int) -> RopeScaling:
    """The default attention factor is ``sqrt(1 + ln(factor) / ln(trained))`` (arXiv:2402.13753)."""
    factor = given.number("factor", max_positions / trained)
    implied = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    return RopeScaling(
        kind="longrope",
        theta=theta,
        factor=factor,
        original_max_positions=trained,
        short_factor=given.numbers("short_factor", pairs),
        long_factor=given.numbers("long_factor", pairs),
        attention_factor=given.number("attention_factor", implied),
    )
