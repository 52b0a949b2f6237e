"""
Native part of emblas.
"""
from __future__ import annotations
import numpy
import numpy.typing
import typing
__all__: list[str] = ['asymmetric_topk', 'build_info', 'compiled_isas', 'cpu_is_amd', 'floret_ids_of_bytes', 'floret_ids_of_strings', 'hamming_distance', 'hamming_topk', 'hash_bag', 'hash_keys', 'isa', 'murmur3_x64_128', 'murmur64a', 'pack_sign', 'quantized_bag', 'range_search_csr', 'segment_pool', 'set_isa', 'supported_isas', 'text_ids_of_bytes', 'text_ids_of_strings', 'varlen_attention', 'word_ngram_ids_of_bytes', 'word_ngram_ids_of_strings']
def asymmetric_topk(queries: numpy.ndarray, codes: numpy.ndarray, k: typing.SupportsInt | typing.SupportsIndex, scale: numpy.ndarray | None) -> tuple[numpy.ndarray, numpy.ndarray]:
    ...
def build_info() -> dict[str, str]:
    """
    Return what this binary was built with: torch, compiler, CUDA toolkit (or empty).
    """
def compiled_isas() -> list[str]:
    """
    Return the instruction sets in this binary, slowest first.
    """
def cpu_is_amd() -> bool:
    """
    Tell whether AMD has made this CPU.
    """
def floret_ids_of_bytes(bytes: numpy.ndarray, offsets: numpy.ndarray, min_n: typing.SupportsInt | typing.SupportsIndex, max_n: typing.SupportsInt | typing.SupportsIndex, num_hashes: typing.SupportsInt | typing.SupportsIndex, seed: typing.SupportsInt | typing.SupportsIndex, num_buckets: typing.SupportsInt | typing.SupportsIndex) -> tuple[numpy.typing.NDArray[numpy.int64], numpy.typing.NDArray[numpy.int32]]:
    ...
def floret_ids_of_strings(strings: list[str], min_n: typing.SupportsInt | typing.SupportsIndex, max_n: typing.SupportsInt | typing.SupportsIndex, num_hashes: typing.SupportsInt | typing.SupportsIndex, seed: typing.SupportsInt | typing.SupportsIndex, num_buckets: typing.SupportsInt | typing.SupportsIndex) -> tuple[numpy.typing.NDArray[numpy.int64], numpy.typing.NDArray[numpy.int32]]:
    ...
def hamming_distance(a: numpy.ndarray, b: numpy.ndarray) -> numpy.ndarray:
    ...
def hamming_topk(queries: numpy.ndarray, codes: numpy.ndarray, k: typing.SupportsInt | typing.SupportsIndex) -> tuple[numpy.ndarray, numpy.ndarray]:
    ...
def hash_bag(ids: numpy.ndarray, table: numpy.ndarray, offsets: numpy.ndarray | None, weights: numpy.ndarray | None, family: typing.SupportsInt | typing.SupportsIndex, seed: typing.SupportsInt | typing.SupportsIndex, num_hashes: typing.SupportsInt | typing.SupportsIndex, padding_id: typing.SupportsInt | typing.SupportsIndex | None) -> numpy.ndarray:
    ...
def hash_keys(ids: numpy.ndarray, family: typing.SupportsInt | typing.SupportsIndex, seed: typing.SupportsInt | typing.SupportsIndex, num_hashes: typing.SupportsInt | typing.SupportsIndex, num_embeddings: typing.SupportsInt | typing.SupportsIndex) -> numpy.typing.NDArray[numpy.int64]:
    ...
def isa() -> str:
    """
    Return the instruction set that the CPU kernels use.
    """
def murmur3_x64_128(data: bytes, seed: typing.SupportsInt | typing.SupportsIndex) -> tuple[int, int]:
    """
    Return MurmurHash3_x64_128 as two 64-bit integers.
    """
def murmur64a(data: bytes, seed: typing.SupportsInt | typing.SupportsIndex) -> int:
    """
    Return MurmurHash64A, with seed 1 spaCy's id of a string.
    """
def pack_sign(x: numpy.ndarray, threshold: numpy.ndarray | None) -> numpy.ndarray:
    ...
def quantized_bag(ids: numpy.ndarray, packed: numpy.ndarray, scale: numpy.ndarray, offsets: numpy.ndarray | None, weights: numpy.ndarray | None, bits: typing.SupportsInt | typing.SupportsIndex, dim: typing.SupportsInt | typing.SupportsIndex, mode: typing.SupportsInt | typing.SupportsIndex, padding_id: typing.SupportsInt | typing.SupportsIndex | None, zero_point: numpy.ndarray | None) -> numpy.ndarray:
    ...
def range_search_csr(queries: numpy.ndarray, codes: numpy.ndarray, radius: typing.SupportsInt | typing.SupportsIndex) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    ...
def segment_pool(x: numpy.ndarray, cu_seqlens: numpy.ndarray, weights: numpy.ndarray | None, normalize: bool) -> numpy.ndarray:
    ...
def set_isa(name: str) -> None:
    """
    Use the kernels of one instruction set; ValueError where this CPU can't run it.
    """
def supported_isas() -> list[str]:
    """
    Return those of compiled_isas() that this CPU can run.
    """
def text_ids_of_bytes(bytes: numpy.ndarray, offsets: numpy.ndarray, kind: typing.SupportsInt | typing.SupportsIndex, min_n: typing.SupportsInt | typing.SupportsIndex, max_n: typing.SupportsInt | typing.SupportsIndex, multiplier: typing.SupportsInt | typing.SupportsIndex, modulus: typing.SupportsInt | typing.SupportsIndex) -> tuple[numpy.typing.NDArray[numpy.int64], numpy.typing.NDArray[numpy.int32]]:
    ...
def text_ids_of_strings(strings: list[str], kind: typing.SupportsInt | typing.SupportsIndex, min_n: typing.SupportsInt | typing.SupportsIndex, max_n: typing.SupportsInt | typing.SupportsIndex, multiplier: typing.SupportsInt | typing.SupportsIndex, modulus: typing.SupportsInt | typing.SupportsIndex) -> tuple[numpy.typing.NDArray[numpy.int64], numpy.typing.NDArray[numpy.int32]]:
    ...
def varlen_attention(q: numpy.ndarray, k: numpy.ndarray, v: numpy.ndarray, cu_seqlens_q: numpy.ndarray, cu_seqlens_k: numpy.ndarray, softmax_scale: typing.SupportsFloat | typing.SupportsIndex, window_left: typing.SupportsInt | typing.SupportsIndex, window_right: typing.SupportsInt | typing.SupportsIndex) -> numpy.ndarray:
    ...
def word_ngram_ids_of_bytes(bytes: numpy.ndarray, offsets: numpy.ndarray, sentences: numpy.ndarray, max_n: typing.SupportsInt | typing.SupportsIndex, num_buckets: typing.SupportsInt | typing.SupportsIndex) -> tuple[numpy.typing.NDArray[numpy.int64], numpy.typing.NDArray[numpy.int32]]:
    ...
def word_ngram_ids_of_strings(sentences: list[list[str]], max_n: typing.SupportsInt | typing.SupportsIndex, num_buckets: typing.SupportsInt | typing.SupportsIndex) -> tuple[numpy.typing.NDArray[numpy.int64], numpy.typing.NDArray[numpy.int32]]:
    ...
