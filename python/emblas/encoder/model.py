"""Encoders: a tokenizer, a model and what turns its hidden states into embeddings."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emblas import packed
from emblas.binary import Int8Quantizer, pack_sign
from emblas.encoder import checks
from emblas.encoder.branches import PackedBranches, pack_branches
from emblas.encoder.fingerprint import fingerprint
from emblas.encoder.loading import sentence_transformer, take_over
from emblas.encoder.outputs import (
    Collector,
    Embeddings,
    chunk_spans,
    concatenate,
    to_numpy,
    warn_truncated,
)
from emblas.encoder.prefixes import ParallelPrefixes
from emblas.encoder.tokens import (
    Branches,
    branch_tokens,
    prompt_tokens,
    special_tokens,
    token_limit,
    tokenize,
)
from emblas.integrations import last_layer
from emblas.integrations import transformers as hf
from emblas.integrations.optimize import optimize
from emblas.losses import gather_rows
from emblas.pooling import Epilogue, LexicalWeights, segment_pool, span_pool
from emblas.pooling.functions import check_modes

WINDOW = 16384  # texts that are tokenized and sorted by length together
POOLED = frozenset({"dense", "matryoshka", "int8", "bits"})  # outputs made of pooled vectors alone


class Encoder:
    """Texts to embeddings, without padding from the tokenizer to the pooled vector.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        It is optimized in place (see :func:`emblas.optimize`) and put into evaluation mode.
    tokenizer : transformers tokenizer
        Of that model.
    pooling : str or sequence of str, default "mean"
        See :func:`emblas.pooling.segment_pool`.
    normalize : bool, default True
        Vectors of length 1, dense and of prefixes, chunks and tokens.
    head : callable, optional
        Turns pooled vectors ``(texts, hidden)`` into embeddings, before they are normalized.
    prompts : mapping of str to str, optional
        Texts to put before queries (``"query"``) and documents (``"document"``), and others.
    default_prompt : str, default ""
        What is put before texts where no prompt is named: the name of one of ``prompts``, or a
        text.
    include_prompt : bool, default True
        Pool the tokens of the prompt as well; otherwise, chunks begin behind it, too.
    max_length : int, optional
        Most tokens of a text, at least one beside those that the tokenizer adds; default: its
        ``model_max_length``, where it has one, or the model's ``max_position_embeddings``.
    lexical : LexicalWeights, optional
        The sparse head, for the output "lexical".
    token_head : callable, optional
        Turns hidden states ``(tokens, hidden)`` into the vectors of the output "tokens".
    prefixes : ParallelPrefixes, optional
        Learned prefixes, for the output "prefixes".
    token_budget : int, default 2048
        Most tokens in a batch; a GPU wants more.

    Attributes
    ----------
    dim : int
        Length of the dense vectors.

    Raises
    ------
    TypeError, ValueError
        If ``model`` or ``tokenizer`` is something else, or a setting is out of range.
    UnsupportedModelError
        If the model can't be optimized. As behind any error, it is left as it was.

    Examples
    --------
    >>> encoder = emblas.Encoder.load("model-folder")  # doctest: +SKIP
    >>> vectors = encoder.encode(["one text", "another"])  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        pooling: str | Sequence[str] = "mean",
        normalize: bool = True,
        head: Callable[[Tensor], Tensor] | None = None,
        prompts: Mapping[str, str] | None = None,
        default_prompt: str = "",
        include_prompt: bool = True,
        max_length: int | None = None,
        lexical: LexicalWeights | None = None,
        token_head: Callable[[Tensor], Tensor] | None = None,
        prefixes: ParallelPrefixes | None = None,
        token_budget: int = 2048,
    ) -> None:
        checks.model(model, tokenizer)
        self.modes = check_modes(pooling)
        self.max_length = token_limit(model, tokenizer, max_length)
        if token_budget < 1:
            raise ValueError(f"token_budget must be at least 1 token, got {token_budget}")
        self.tokenizer = tokenizer
        self.normalize = normalize
        self.head = head
        self.prompts = dict(prompts or {})
        self.default_prompt = default_prompt
        self.include_prompt = include_prompt
        self.lexical = lexical
        self.token_head = token_head
        self.prefixes = prefixes
        self.token_budget = token_budget
        with contextlib.ExitStack() as undo:  # a head that doesn't fit leaves nothing changed
            if hf.implementation(model.config) != hf.NAME:
                undo.enter_context(optimize(model))
            self.dim = self._width(model)
            undo.pop_all()
        self.model = model.eval()

    @classmethod
    def load(cls, folder: str | Path, *, device: str | None = None, **options: Any) -> Encoder:
        """Load a model from its folder or its name on a hub.

        Parameters
        ----------
        folder : str or Path
            Of sentence-transformers (with a ``modules.json``), whose pooling, layers, prompts and
            maximum length are taken over, or of transformers.
        device : str, optional
            Where it runs; default: where the library puts it.
        **options
            Further arguments of :class:`Encoder`, over what the folder says.
        """
        if Path(folder).is_dir() and not (Path(folder) / "modules.json").exists():
            from transformers import AutoModel, AutoTokenizer

            model = AutoModel.from_pretrained(folder)
            return cls(model.to(device), AutoTokenizer.from_pretrained(folder), **options)
        return cls.from_sentence_transformer(sentence_transformer(folder, device), **options)

    @classmethod
    def from_sentence_transformer(
        cls, model: Any, route: str | None = None, **options: Any
    ) -> Encoder:
        """Take over a loaded model of sentence-transformers, which shares its parameters.

        Parameters
        ----------
        model : SentenceTransformer
            It is optimized in place.
        route : str, optional
            Of a model that starts with a ``Router``, the modules for this task.
        **options
            Further arguments of :class:`Encoder`, over what the model says.

        Raises
        ------
        ValueError
            If it isn't a transformer, a pooling of its tokens and layers on the pooled vectors, or
            if it reads chat messages instead of texts.
        """
        transformer, tokenizer, settings = take_over(model, route)
        return cls(transformer, tokenizer, **{**settings, **options})

    # --- the public calls --------------------------------------------------------------------

    def encode(
        self,
        texts: str | Iterable[str],
        *,
        prompt: str | None = None,
        truncation: str = "warn",
        progress: bool = False,
        as_numpy: bool = True,
    ) -> Any:
        """Embed texts.

        Parameters
        ----------
        texts : str or iterable of str
            One text, a list, or an iterator, which is read by and by. Empty texts are legal.
        prompt : str, optional
            The name of one of ``prompts``, or a text, to put before every text; "" for nothing.
            Default: ``default_prompt``.
        truncation : {"warn", "error", "ignore"}, default "warn"
            What to do about texts of more than ``max_length`` tokens, which are cut: one
            :class:`TruncationWarning` with their number, or a ValueError before the texts beside
            them are embedded.
        progress : bool, default False
            Show a progress bar (needs tqdm).
        as_numpy : bool, default True
            Return numpy arrays; otherwise tensors, on the model's device.

        Returns
        -------
        ndarray or Tensor
            float32 ``(texts, dim)``; ``(dim,)`` for a single ``str``.

        Raises
        ------
        TypeError
            If a text is not a str.
        ValueError
            If a text is too long and ``truncation="error"``.
        """
        if isinstance(texts, str):
            return self.encode([texts], prompt=prompt, truncation=truncation, as_numpy=as_numpy)[0]
        return self.embed(
            texts, prompt=prompt, truncation=truncation, progress=progress, as_numpy=as_numpy
        ).dense

    def encode_query(self, texts: str | Iterable[str], **options: Any) -> Any:
        """:meth:`encode` with the prompt "query", if the model has one."""
        return self.encode(texts, **{"prompt": self._first_prompt("query"), **options})

    def encode_document(self, texts: str | Iterable[str], **options: Any) -> Any:
        """:meth:`encode` with the prompt "document", "passage" or "corpus", if there is one."""
        prompt = self._first_prompt("document", "passage", "corpus")
        return self.encode(texts, **{"prompt": prompt, **options})

    def prompt_text(self, prompt: str | None) -> str:
        """Return the text that :meth:`encode` puts before texts for this ``prompt``."""
        prompt = self.default_prompt if prompt is None else prompt
        return self.prompts.get(prompt, prompt)

    def embed(
        self, texts: Iterable[str], outputs: Sequence[str] = ("dense",), **options: Any
    ) -> Embeddings:
        """Compute several outputs in one pass through the model.

        Parameters
        ----------
        texts : iterable of str
            As in :meth:`encode`.
        outputs : sequence of str, default ("dense",)
            Of "dense", "matryoshka" (``dims``), "int8", "bits", "lexical" (the encoder needs that
            head), "tokens" (one vector per token), "chunks" (late chunking, arXiv 2409.04701:
            one vector per ``chunk_size`` tokens, pooled after the model has read all of the text)
            "branches" (causal models pooled by the last token: one vector per text and text of
            ``branches``, such as an instruction, behind it; the text itself is read once, in a pass
            of its own beside that of the other outputs, and cut so that the longest one fits) and
            "prefixes" (one vector per text and learned prefix in front of it, in a pass of their
            own; texts are cut so that the prefix fits).
        **options
            ``prompt``, ``truncation``, ``progress``, ``as_numpy`` as in :meth:`encode`; ``dims``
            (sequence of int); ``quantizer`` (:class:`emblas.binary.Int8Quantizer`, without which
            the range of the dense vectors of these texts is taken); ``chunk_size`` (default 128
            tokens) and ``chunk_overlap`` (default 0); ``branches`` (sequence of str).

        Returns
        -------
        Embeddings
            A field per output.

        Raises
        ------
        TypeError, ValueError
            As in :meth:`encode`, and if an output is unknown or lacks what it needs.
        """
        checks.outputs(outputs)
        options = dict(options)
        quantizer, as_numpy = options.pop("quantizer", None), options.pop("as_numpy", True)
        late = "int8" in outputs and quantizer is None  # the range is known when all are done
        asked = [*outputs, *(["dense"] if late and "dense" not in outputs else [])]
        if late:
            asked.remove("int8")
        parts = list(self.stream(texts, asked, quantizer=quantizer, as_numpy=False, **options))
        if not parts:
            settings = {
                k: options[k]
                for k in ("dims", "chunk_size", "chunk_overlap", "branches")
                if k in options
            }
            parts = [self._embed([], asked, "", "ignore", quantizer=quantizer, **settings)]
        result = concatenate(parts)
        if late:
            if len(result):
                result.quantizer = Int8Quantizer.fit(result.dense)
                result.int8 = result.quantizer.quantize(result.dense)
            else:
                result.int8 = result.dense.to(torch.int8)
            if "dense" not in outputs:
                result.dense = None
        converted: Embeddings = to_numpy(result) if as_numpy else result
        return converted

    def stream(
        self,
        texts: Iterable[str],
        outputs: Sequence[str] = ("dense",),
        *,
        prompt: str | None = None,
        truncation: str = "warn",
        progress: bool = False,
        as_numpy: bool = True,
        window: int = WINDOW,
        **options: Any,
    ) -> Iterator[Embeddings]:
        """Yield the embeddings of ``window`` texts after the other, in the order of the texts.

        Texts are read as they are needed, so that an iterator without end will do. Arguments are
        those of :meth:`embed`; "int8" needs a ``quantizer``.
        """
        checks.outputs(outputs)
        checks.request(self, outputs, truncation, **options)
        if window < 1:
            raise ValueError(f"window must be at least 1 text, got {window}")
        if isinstance(texts, str) or not isinstance(texts, Iterable):
            raise TypeError(
                f"texts must be a list or an iterator of str, got a single {type(texts).__name__}"
            )
        prompt = self.prompt_text(prompt)
        total = len(texts) if isinstance(texts, Sequence) else None
        rest = iter(texts)
        cut = longest = done = 0
        with _progress_bar(progress, total) as bar:
            while part := list(itertools.islice(rest, window)):
                for i, text in enumerate(part):
                    if not isinstance(text, str):
                        raise TypeError(
                            f"texts[{done + i}] must be a str, got {type(text).__name__}"
                        )
                result = self._embed(
                    part, outputs, prompt, truncation, first=done, bar=bar, **options
                )
                done += len(part)
                cut += int((result.tokens_cut > 0).sum())
                longest = max(longest, int((result.tokens_cut + result.num_tokens).max()))
                yield to_numpy(result) if as_numpy else result
        if cut and truncation == "warn":
            warn_truncated(
                f"{cut} of {done} texts were cut to {self.max_length} tokens, the longest has "
                f"{longest}; Embeddings.tokens_cut says which"
            )

    def encode_distributed(self, texts: Iterable[str], **options: Any) -> Any:
        """:meth:`encode`, shared among the processes of ``torch.distributed``.

        Every process calls this with the same texts and gets all embeddings.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be a list or an iterator of str, got a single str")
        texts, options = list(texts), dict(options)
        as_numpy = options.pop("as_numpy", True)
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        own = self.encode(texts[rank::world], as_numpy=False, **options)
        rows, _ = gather_rows(own)
        order = [i for r in range(world) for i in range(r, len(texts), world)]
        out = torch.empty_like(rows)
        out[order] = rows
        return to_numpy(out) if as_numpy else out

    def fingerprint(self) -> str:
        """Return a hash of all that its vectors depend on but texts and prompts.

        Of the parameters and settings of the model, the heads and the prefixes, and of the
        tokenizer's vocabulary and rules. A head that is a function and no module is known by what
        it gives for a few fixed rows: one that draws random numbers is another one each time.
        """
        return fingerprint(self)

    # --- parts -------------------------------------------------------------------------------

    @torch.no_grad()
    def _width(self, model: Any) -> int:
        """Length of the dense vectors, of which the head has the last word."""
        zeros = torch.zeros(1, model.config.hidden_size, dtype=model.dtype, device=model.device)
        return self._pool(zeros, packed.offsets([1]).to(zeros.device), 0).shape[1]

    def _first_prompt(self, *names: str) -> str | None:
        return next((name for name in names if name in self.prompts), None)

    @torch.no_grad()
    def _embed(
        self,
        texts: Sequence[str],
        outputs: Sequence[str],
        prompt: str,
        truncation: str,
        *,
        first: int = 0,
        dims: Sequence[int] | None = None,
        quantizer: Int8Quantizer | None = None,
        chunk_size: int = 128,
        chunk_overlap: int = 0,
        branches: Sequence[str] | None = None,
        bar: Any = None,
    ) -> Embeddings:
        tails = None if branches is None else branch_tokens(self.tokenizer, branches)
        prefixes = self.prefixes if "prefixes" in outputs else None
        added = 0 if tails is None else tails.longest
        added = max(added, 0 if prefixes is None else prefixes.length)
        room = self.max_length - added
        if added and room <= special_tokens(self.tokenizer):
            raise ValueError(
                f"branches and prefixes leave no token to a text of max_length = {self.max_length}"
            )
        tokens = tokenize(self.tokenizer, texts, prompt, room, truncation, first)
        skip = 0 if self.include_prompt else prompt_tokens(self.tokenizer, prompt)
        whole = (
            skip > 0
            or not POOLED.issuperset(outputs)
            or not last_layer.MODES.issuperset(self.modes)
            or not last_layer.is_patched(self.model)
        )
        lengths = [len(ids) for ids in tokens.ids]
        kept = Collector(len(texts))
        if tails is not None:
            self._put_branches(kept, tokens.ids, tails)
        if prefixes is not None:
            self._put_prefixes(kept, tokens.ids, prefixes, skip)
        batches = packed.token_budget_batches(lengths, self.token_budget) if texts else [[]]
        for batch in batches if not {"branches", "prefixes"}.issuperset(outputs) else []:
            token_ids, cu_seqlens = self._packed([tokens.ids[i] for i in batch])
            rows = None if whole else last_layer.pooled_rows(cu_seqlens, self.modes)
            options = {} if rows is None else {last_layer.KEY: rows.rows}
            hidden = self._hidden(token_ids, cu_seqlens, **options)
            dense = self._pool(hidden, cu_seqlens if rows is None else rows.cu_seqlens, skip)
            if "dense" in outputs:
                kept.put("dense", batch, dense)
            if dims is not None:
                shortened = Epilogue(dims=tuple(dims), normalize=self.normalize)(dense)
                for k, prefix in zip(dims, shortened, strict=True):
                    kept.put(f"matryoshka {k}", batch, prefix)
            if "int8" in outputs and quantizer is not None:
                kept.put("int8", batch, quantizer.quantize(dense))
            if "bits" in outputs:
                kept.put("bits", batch, pack_sign(dense))
            if "lexical" in outputs and self.lexical is not None:
                sparse = self.lexical(hidden, token_ids, cu_seqlens)
                kept.put_ragged("lexical ids", batch, sparse.col_indices, sparse.crow_indices)
                kept.put_ragged(
                    "lexical weights", batch, sparse.values.float(), sparse.crow_indices
                )
            if "tokens" in outputs:
                vectors = hidden if self.token_head is None else self.token_head(hidden)
                kept.put_ragged("tokens", batch, self._finish(vectors.float()), cu_seqlens)
            if "chunks" in outputs:
                starts, ends, offsets = chunk_spans(cu_seqlens, chunk_size, chunk_overlap, skip)
                vectors = span_pool(hidden, starts, ends, self.modes)
                kept.put_ragged("chunks", batch, self._headed(vectors), offsets)
                begins = cu_seqlens[:-1].long().repeat_interleave(offsets.diff())[:, None]
                spans = torch.stack([starts, ends], 1) - begins
                kept.put_ragged("chunk spans", batch, spans, offsets)
            if bar is not None:
                bar.update(len(batch))
        matryoshka = None
        if dims is not None:
            matryoshka = {k: kept.rows(f"matryoshka {k}") for k in dims}
        return Embeddings(
            num_tokens=torch.tensor(lengths, dtype=torch.int64),
            tokens_cut=torch.tensor(tokens.cut, dtype=torch.int64),
            dense=kept.rows("dense"),
            matryoshka=matryoshka,
            int8=kept.rows("int8"),
            quantizer=quantizer,
            bits=kept.rows("bits"),
            lexical_ids=kept.ragged("lexical ids"),
            lexical_weights=kept.ragged("lexical weights"),
            tokens=kept.ragged("tokens"),
            chunks=kept.ragged("chunks"),
            chunk_spans=kept.ragged("chunk spans"),
            branches=kept.rows("branches"),
            prefixes=kept.rows("prefixes"),
        )

    def _put_branches(self, kept: Collector, texts: Sequence[list[int]], tails: Branches) -> None:
        """Vectors of every text with every branch, from a pass of their own."""
        added = sum(map(len, tails.ids)) - tails.end
        lengths = [len(ids) + added for ids in texts]
        batches = packed.token_budget_batches(lengths, self.token_budget) if texts else [[]]
        for batch in batches:
            at = pack_branches([texts[i] for i in batch], tails)
            at = PackedBranches(*(part.to(self.model.device) for part in at))
            hidden = self._hidden(
                at.token_ids,
                at.cu_seqlens,
                position_ids=at.positions + hf.position_start(self.model.base_model),
                **{hf.BRANCH: at.branch},
            )
            vectors = self._headed(hidden[at.last.flatten()])
            kept.put("branches", batch, vectors.unflatten(0, at.last.shape))

    def _put_prefixes(
        self, kept: Collector, texts: Sequence[list[int]], prefixes: ParallelPrefixes, skip: int
    ) -> None:
        """Vectors of every text behind every prefix, from a pass of their own."""
        lengths = [prefixes.count * (prefixes.length + len(ids)) for ids in texts]
        skip = 0 if self.include_prompt else prefixes.length + skip
        batches = packed.token_budget_batches(lengths, self.token_budget) if texts else [[]]
        for batch in batches:
            hidden, offsets = prefixes(
                self.model.base_model, *self._packed([texts[i] for i in batch])
            )
            vectors = self._pool(hidden, offsets, skip)
            kept.put("prefixes", batch, vectors.unflatten(0, (len(batch), prefixes.count)))

    def _packed(self, texts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and offsets of a packed batch, on the device of the model."""
        flat = list(itertools.chain.from_iterable(texts))
        ids = torch.tensor(flat, dtype=torch.int64, device=self.model.device)
        return ids, packed.offsets([len(text) for text in texts]).to(ids.device)

    def _hidden(self, token_ids: Tensor, cu_seqlens: Tensor, **options: Any) -> Tensor:
        """Last hidden states, of all tokens or of those that are pooled."""
        if len(token_ids) == 0:  # models don't take batches without a token
            size = self.model.config.hidden_size
            return torch.zeros(0, size, dtype=self.model.dtype, device=self.model.device)
        return hf.forward_packed(self.model.base_model, token_ids, cu_seqlens, **options)

    def _pool(self, hidden: Tensor, cu_seqlens: Tensor, skip: int) -> Tensor:
        pooled = segment_pool(hidden, cu_seqlens, self.modes, skip_prefix=skip or None)
        return self._headed(pooled)

    def _headed(self, pooled: Tensor) -> Tensor:
        return self._finish((pooled if self.head is None else self.head(pooled)).float())

    def _finish(self, vectors: Tensor) -> Tensor:
        if not self.normalize:
            return vectors
        finished = Epilogue(normalize=True)(vectors)
        assert isinstance(finished, Tensor)
        return finished


def _progress_bar(wanted: bool, total: int | None) -> Any:
    if not wanted:
        return contextlib.nullcontext()
    from tqdm import tqdm

    return tqdm(total=total, unit=" texts")
