"""A project that uses emblas as installed: every family, with torch and with numpy."""

import emblas
import numpy as np
import torch
from emblas.attention import varlen_attention
from emblas.binary import arrays as binary_arrays
from emblas.binary import hamming_topk, pack_sign
from emblas.pooling import arrays as pooling_arrays
from emblas.pooling import segment_pool
from emblas.tables import HashEmbedding

cu_seqlens = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
words = HashEmbedding(num_embeddings=100, embedding_dim=64, seed=1)
tokens = words(torch.arange(8))
with torch.no_grad():
    q = tokens.detach().view(8, 2, 32)
    attended = varlen_attention(q, q, q, cu_seqlens, cu_seqlens, 5, 5)
assert attended.shape == (8, 2, 32)
pooled = segment_pool(tokens, cu_seqlens, normalize=True)
pooled.sum().backward()
assert words.weight.grad is not None
codes = pack_sign(pooled.detach())
distances, ids = hamming_topk(codes[2:], codes, k=2)
assert distances[0, 0] == 0
assert ids[0, 0] == 2

array = np.ones((8, 64), np.float32)
assert pooling_arrays.segment_pool(array, cu_seqlens.numpy())[0].sum() == 64
assert binary_arrays.pack_sign(array).shape == (8, 8)
print(f"emblas {emblas.__version__} with torch {torch.__version__}, {emblas.info()['isa']}: ok")
