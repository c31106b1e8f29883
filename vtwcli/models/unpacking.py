"""Packed weights back into numbers, exactly as the libraries that packed them define it.

A function takes the stored parts of one weight by their names and the type to compute in, and gives the weight as
``nn.Linear`` holds it, [outputs, inputs]. In float32 nothing is lost: a value is a small whole number (or an eight-bit
float) times a scale of at most sixteen bits, or the product that float32 rounds it to where the scale has more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Unpack = Callable[[Mapping[str, Tensor], torch.dtype], Tensor]

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word of AWQ the k-th of eight neighbours lies, counted in four bits from the lowest."""


def words_to_numbers(words: Tensor, bits: int, count: int) -> Tensor:
    """Unsigned numbers of ``bits`` bits that lie one behind the other in 32-bit words, also across two of them.

    Args:
        words: int32 [..., n].
        bits: 1 to 8.
        count: how many numbers to give.

    Returns:
        int32 [..., count].
    """
    wide = words.to(torch.int64) & 0xFFFFFFFF
    wide = torch.cat([wide, wide.new_zeros(*wide.shape[:-1], 1)], -1)
    first = torch.arange(count) * bits
    at, shift = first // 32, first % 32
    pairs = wide[..., at] | (wide[..., at + 1] << 32)
    return ((pairs >> shift) & ((1 << bits) - 1)).to(torch.int32)


def per_value(scales: Tensor, shape: tuple[int, ...], group: Tensor | None = None) -> Tensor:
    """One scale for every weight, from one for all, one a row, or one for a group of columns.

    Args:
        scales: of one value, or [rows], or [rows, groups of columns].
        shape: of the weight, [outputs, inputs].
        group: the group of each column, where neighbours are not together.
    """
    if scales.numel() == 1:
        return scales.reshape(1, 1).expand(shape)
    scales = scales.reshape(len(scales), -1)
    if scales.shape[1] == 1:
        return scales.expand(shape)
    if group is not None:
        return scales[:, group.to(torch.int64)]
    return scales.repeat_interleave(shape[1] // scales.shape[1], 1)


def compressed(shape: tuple[int, ...], bits: int, block: tuple[int, int] | None = None) -> Unpack:
    """Of compressed-tensors: whole numbers in words, eight-bit whole numbers, eight-bit floats.

    Args:
        shape: of the weight.
        bits: of a value in words.
        block: rows and columns of a block that has one scale.
    """

    def unpack(parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        scales, zeros, group = (parts.get(f"weight_{name}") for name in ("scale", "zero_point", "g_idx"))
        assert scales is not None
        if "weight_packed" in parts:
            half = 1 << (bits - 1)
            values = words_to_numbers(parts["weight_packed"], bits, shape[1]) - half
            if zeros is not None:
                zeros = words_to_numbers(zeros.T, bits, shape[0]).T - half
        else:
            values = parts["weight"]

        def spread(x: Tensor) -> Tensor:
            if block is not None and x.numel() > 1:
                x = x.repeat_interleave(block[0], 0)[: shape[0]].repeat_interleave(block[1], 1)
                return x[:, : shape[1]]
            return per_value(x, shape, group)

        numbers = values.to(dtype)
        if zeros is not None:
            numbers = numbers - spread(zeros).to(dtype)
        return numbers * spread(scales.to(dtype))

    return unpack


def gptq(shape: tuple[int, ...], bits: int, off_by_one: bool) -> Unpack:
    """Of GPTQ: numbers packed along the inputs, zero points along the outputs.

    Args:
        shape: of the weight.
        bits: of a value: 2, 4 or 8.
        off_by_one: zero points are stored less one, as the first version of the format does.
    """

    def unpack(parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        values = words_to_numbers(parts["qweight"].T, bits, shape[1])
        zeros = words_to_numbers(parts["qzeros"], bits, shape[0])
        if off_by_one:
            zeros = (zeros + 1) & ((1 << bits) - 1)
        group = parts.get("g_idx")
        numbers = values - per_value(zeros.T, shape, group)
        return numbers.to(dtype) * per_value(parts["scales"].to(dtype).T, shape, group)

    return unpack


def awq(shape: tuple[int, ...]) -> Unpack:
    """Of AWQ in four bits (``gemm``): eight neighbouring outputs in a word, in an order of its own.

    Args:
        shape: of the weight.
    """
    order = torch.tensor(_AWQ_ORDER)

    def numbers(words: Tensor) -> Tensor:
        found = words_to_numbers(words, 4, shape[0]).unflatten(-1, (-1, 8))
        return found[..., order].flatten(-2)

    def unpack(parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        zeros = numbers(parts["qzeros"]).T if "qzeros" in parts else torch.full((1, 1), 8)
        values = numbers(parts["qweight"]).T - per_value(zeros, shape)
        return values.to(dtype) * per_value(parts["scales"].to(dtype).T, shape)

    return unpack
