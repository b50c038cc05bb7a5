"""Generative retrieval: a language model writes the identifier of the document that answers a query.

The tokens of all identifiers, each with the token that ends a turn, form a trie. Beam search extends a
hypothesis by tokens of the trie only, so every complete hypothesis is the identifier of a document. The score
of a document is the log-probability of its identifier, log p(identifier | prompt), which is not divided by
the number of tokens. A beam that is at least as wide as the number of documents finds the exact ranking.

The prompt is that of the environment `identify-v1`, which trains such a model. All documents and
hypotheses are held in memory: this is for collections of up to a few thousand documents.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rlkit.encoding import encodable
from rlkit.errors import UserError, first_line
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.documents import Document, EngineError, Query, Result, check_k
from rlkit.retrieval.encoders import num_positions

if TYPE_CHECKING:
    import torch
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

MIN_WIDTH = 20  # of a beam: a narrow one loses identifiers whose first token is improbable
MAX_ROWS = 256  # hypotheses of one forward pass, except if one query needs more
_PROMPT = "Which document answers this query? Write only its identifier.\n\nQuery: {query}"


def identify_prompt(query: str) -> list[dict[str, str]]:
    """Return the chat messages that ask for the identifier of a document; the query is on one line."""
    return [{"role": "user", "content": _PROMPT.format(query=" ".join(query.split()))}]


def documents_by_identifier(collection: Collection) -> dict[str, Document]:
    """Return the documents of a collection by the identifiers that a model writes: the ids that are judged.

    If the collection ranks passages, the first passage of each document is returned.

    Raises:
        UserError: An id is empty, has several lines, or begins or ends with white space.
    """
    documents: dict[str, Document] = {}
    for document in collection.documents():
        name = collection.judged_id(document.id)
        if len(name.splitlines()) != 1 or name != name.strip():
            raise UserError(
                f"{collection.name}: a model writes the ids of the documents, so an id must be one line "
                f"without white space around it, not {name!r:.60}; rename it in the corpus and the judgments"
            )
        documents.setdefault(name, document)
    if not documents:
        raise UserError(f"{collection.name} has no documents")
    return documents


@dataclass
class Node:
    """Node of a trie of token ids.

    Attributes:
        children: Nodes that extend this one, by their token.
        leaf: Index of the sequence that ends here; None if the node is within sequences.
    """

    children: dict[int, Node] = field(default_factory=dict)
    leaf: int | None = None


def build_trie(sequences: Sequence[Sequence[int]]) -> Node:
    """Return the root of the trie of token sequences, none of which may be a prefix of another one."""
    root = Node()
    for index, tokens in enumerate(sequences):
        node = root
        for token in tokens:
            node = node.children.setdefault(token, Node())
        node.leaf = index
    return root


@dataclass(frozen=True)
class Hypothesis:
    """A path from the root of the trie, which may be the beginning of an answer to one query.

    Attributes:
        query: Index of the query in its batch.
        node: Node at which the path ends.
        score: Log-probability of the path's tokens, given the prompt.
        row: Row of the batch that has computed the path without its last token.
        token: Last token of the path; -1 at the root.
    """

    query: int
    node: Node
    score: float = 0.0
    row: int = 0
    token: int = -1


class GenerativeRetriever:
    """Rank documents by the probability that a language model writes their identifiers.

    Args:
        model: Causal language model with a KV cache.
        tokenizer: Tokenizer of the model, with a chat template.
        documents: Documents by their identifiers, at least one.

    Raises:
        UserError: The model has no KV cache, the tokenizer has no chat template or no EOS token, or it has
            the same tokens for two identifiers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        documents: Mapping[str, Document],
    ):
        parameters = inspect.signature(model.forward).parameters
        if not {"past_key_values", "position_ids", "logits_to_keep"} <= parameters.keys():
            raise UserError(
                f"docid needs a model that supports a KV cache, not {type(model).__name__}; use a transformer"
            )
        if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
            raise UserError(
                "docid needs a tokenizer with a chat template and an EOS token; use an instruction-tuned "
                "model"
            )
        self.model, self.tokenizer = model.eval(), tokenizer
        self.documents = list(documents.values())
        sequences = _identifier_tokens(tokenizer, list(documents))
        self.trie = build_trie(sequences)
        self._max_prompt_tokens = (num_positions(model) or math.inf) - max(map(len, sequences))

    def search(self, queries: Sequence[Query], k: int) -> list[Result]:
        """Return the `k` documents with the most probable identifiers, or all if there are fewer.

        The beam has the width `k`, but at least `MIN_WIDTH`. A query that the model has no positions for gets
        a result with an error.

        Raises:
            EngineError: The model fails, for example because it runs out of memory, or its logits are not
                finite.
        """
        check_k(k)
        width = min(max(k, MIN_WIDTH), len(self.documents))
        results = [Result()] * len(queries)
        prompts = [self._tokenize(query.text) for query in queries]
        rows = []
        for i, prompt in enumerate(prompts):
            if len(prompt) > self._max_prompt_tokens:
                results[i] = Result(
                    error=f"the prompt of the query has {len(prompt)} tokens, and the maximum that leaves "
                    f"room for the identifiers is {self._max_prompt_tokens}"
                )
            else:
                rows.append(i)
        # Prompts of similar length in one batch need less padding.
        rows.sort(key=lambda i: len(prompts[i]))
        batch_size = max(MAX_ROWS // width, 1)
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            try:
                rankings = self._beam_search([prompts[i] for i in batch], width)
            except RuntimeError as error:  # also torch.OutOfMemoryError
                raise EngineError(f"the language model failed: {first_line(error)}") from error
            for i, ranking in zip(batch, rankings, strict=True):
                documents = []
                for hypothesis in ranking[:k]:
                    assert hypothesis.node.leaf is not None  # all are complete
                    documents.append(self.documents[hypothesis.node.leaf])
                results[i] = Result(tuple(documents), tuple(hypothesis.score for hypothesis in ranking[:k]))
        return results

    def _tokenize(self, query: str) -> list[int]:
        return _render(self.tokenizer, identify_prompt(encodable(query)), add_generation_prompt=True)

    def _beam_search(self, prompts: Sequence[Sequence[int]], width: int) -> list[list[Hypothesis]]:
        """Return the complete identifiers of each prompt with the highest scores, best first.

        Args:
            prompts: Token ids of B prompts.
            width: Maximum number of hypotheses of a prompt.
        """
        import torch

        num_tokens = max(map(len, prompts))
        paddings = [num_tokens - len(prompt) for prompt in prompts]
        ids = [[0] * padding + list(prompt) for padding, prompt in zip(paddings, prompts, strict=True)]
        tokens = torch.tensor(ids, device=self.model.device)  # (B, P), padded on the left
        is_padding = torch.arange(num_tokens) < torch.tensor(paddings)[:, None]
        mask = (~is_padding).long().to(self.model.device)
        active = [Hypothesis(query, self.trie) for query in range(len(prompts))]
        finished: list[list[Hypothesis]] = [[] for _ in prompts]
        cache = None
        while active:
            with torch.no_grad():
                output = self.model(
                    input_ids=tokens,
                    attention_mask=mask,
                    # Padding has no positions.
                    position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :],
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
            # A complete identifier competes with incomplete ones, whose scores can only fall.
            beams = [list(of_query) for of_query in finished]
            for extension in _extend(active, output.logits[:, -1].float()):
                beams[extension.query].append(extension)
            beams = [sorted(beam, key=lambda hypothesis: -hypothesis.score)[:width] for beam in beams]
            finished = [[h for h in beam if h.node.leaf is not None] for beam in beams]
            active = [h for beam in beams for h in beam if h.node.leaf is None]
            rows = torch.tensor([h.row for h in active], dtype=torch.long, device=self.model.device)
            tokens = torch.tensor([[h.token] for h in active], device=self.model.device)
            mask = torch.cat([mask[rows], mask.new_ones(len(active), 1)], 1)
            cache = output.past_key_values
            cache.reorder_cache(rows)
        return finished


def _extend(hypotheses: Sequence[Hypothesis], logits: torch.Tensor) -> list[Hypothesis]:
    """Return all extensions of hypotheses by one token of the trie.

    Args:
        hypotheses: R hypotheses, none of which is complete.
        logits: Logits of the token after each of them, float32 (R, V).

    Raises:
        EngineError: A log-probability is NaN or infinite.
    """
    paths = [(row, token) for row, parent in enumerate(hypotheses) for token in parent.node.children]
    rows, tokens = (list(column) for column in zip(*paths, strict=True))
    log_probs = (logits[rows, tokens] - logits.logsumexp(-1)[rows]).tolist()
    if not all(map(math.isfinite, log_probs)):
        raise EngineError("the language model returned NaN or infinite log-probabilities")
    extensions = []
    for (row, token), log_prob in zip(paths, log_probs, strict=True):
        parent = hypotheses[row]
        node = parent.node.children[token]
        extensions.append(Hypothesis(parent.query, node, parent.score + log_prob, row, token))
    return extensions


def _identifier_tokens(tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> list[list[int]]:
    """Return the token ids of identifiers as turns of an assistant, up to the token that ends the turn.

    The chat template decides which token that is, and whether it writes something before the answer, such as
    an empty thought.

    Raises:
        UserError: The template does not continue its own prompt, the tokenizer has the same tokens for two
            identifiers, as it has for unknown characters, or a token that ends a turn is within one.
    """
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = (special | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}
    prompt = identify_prompt("query")
    prefix = _render(tokenizer, prompt, add_generation_prompt=True)
    sequences: dict[tuple[int, ...], str] = {}
    for name in names:
        answer = {"role": "assistant", "content": encodable(name)}
        tokens = _render(tokenizer, [*prompt, answer], add_generation_prompt=False)
        if tokens[: len(prefix)] != prefix:
            raise UserError(
                "docid needs a chat template that formats an answer as a continuation of its prompt; use "
                "another model"
            )
        turn = tokens[len(prefix) :]
        ends = [i for i, token in enumerate(turn) if token in special]
        sequence = (*turn[: ends[-1] + 1],) if ends else (*turn, tokenizer.eos_token_id)
        if sequence[-1] in sequence[:-1] or sequence in sequences:
            reason = (
                f"it has the tokens of {sequences[sequence]!r}"
                if sequence in sequences
                else "it has a token that ends the answer"
            )
            raise UserError(
                f"the model cannot write the identifier {name!r:.60}: {reason}; rename the document, or use "
                "another model"
            )
        sequences[sequence] = name
    return [list(sequence) for sequence in sequences]


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, add_generation_prompt: bool
) -> list[int]:
    """Return the token ids of chat messages; raise UserError if the chat template fails."""
    try:
        encoding: BatchEncoding = tokenizer.apply_chat_template(  # type: ignore[assignment]
            messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True
        )
    except Exception as error:  # a template is a program: jinja raises whatever its code raises
        raise UserError(
            f"the chat template of the model cannot format the prompt: {first_line(error)}; fix the template "
            "in the model's folder"
        ) from error
    return encoding["input_ids"]


def open_identifier(name: str, collection: Collection) -> GenerativeRetriever:
    """Load a language model that ranks the documents of a collection, on the GPU if there is one.

    Args:
        name: Name or folder of the model, such as `runs/identify/model`.
        collection: Collection whose documents are ranked.

    Raises:
        UserError: The model cannot be loaded or cannot write the ids of the documents.
    """
    import torch
    from trl import ModelConfig

    from rlkit.models.load import load_model

    documents = documents_by_identifier(collection)
    model, tokenizer = load_model(ModelConfig(model_name_or_path=name, dtype="float32"))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return GenerativeRetriever(model, tokenizer, documents)
