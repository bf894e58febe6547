"""A judge in this process: a small transformers model, by log-probabilities."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import cached_property
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from metasae_lib.interpret.judges.questions import JudgeError, Question, choice, one_line
from metasae_lib.study.errors import first_line
from metasae_lib.subject import embedded
from metasae_lib.subject.head import Head
from metasae_lib.subject.model import load_weights


class InProcessJudge:
    """A small transformers model in this process, asked by the log-probability of its options.

    The options of a question are its texts x, and the evidence for one under an explanation e is
    how much the explanation helps to predict it: log p(x | e) - log p(x), in nats. The difference
    takes out how fluent a text is, which would betray a replaced token by itself. Fuzzing: the text
    with more evidence. Detection: evidence above 0. Strength: evidence through a rising curve.
    Nothing is parsed or sampled. (A 135M model asked to *say* A or B always says A.)

    The model reads what it was trained to read: a chat model its own template, in which the text is
    the answer; another its own start token. source: as `model.source` of a profile. Raises
    JudgeError, before anything is asked, for a model whose logits cannot be had this way.
    """

    def __init__(self, source: str = "embedded:smollm2-135m", batch_tokens: int = 4096) -> None:
        self._source, self._batch_tokens = source, batch_tokens
        model = embedded.identity(source)
        self.identity = {"judge": "in-process", "model": model, "version": 4}
        self._plain: dict[tuple[str, str], float] = {}

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, str | None]]:
        """Answers block by block, so that a killed run keeps what it had."""
        for start in range(0, len(questions), _BLOCK_QUESTIONS):
            block = questions[start : start + _BLOCK_QUESTIONS]
            explain = [k for k, q in enumerate(block) if q.task == "explain"]
            texts = self._generate([block[k].messages for k in explain])
            yield from ((start + k, text) for k, text in zip(explain, texts, strict=True))
            rest = [k for k, q in enumerate(block) if q.task != "explain"]
            evidence = self._evidence(
                {(block[k].explanation, e.text) for k in rest for e in block[k].examples}
            )
            for k in rest:
                values = [evidence[block[k].explanation, e.text] for e in block[k].examples]
                yield start + k, choice(block[k].task, values)

    @cached_property
    def model(self) -> Any:
        """The language model, loaded on first use, on a GPU where there is one."""
        model = load_weights(embedded.snapshot(self._source), torch.bfloat16)
        return model.to("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def _head(self) -> Head:
        """What makes logits of hidden states, once packed texts were found to score as alone do."""
        head = Head(self.model.get_output_embeddings(), self.model.config)
        # Longer than any prompt, so that an attention window shows.
        prompt, ids = self._prompt("any text " * 40), self._ids("one two three four five six seven")
        row, plain = _Tree("", prompt), list[float]()
        try:
            for text in (ids, ids[:2] + ids[4:]):
                row.add("", text)
                given = torch.tensor([[*prompt, *text]], device=self.model.device)
                with torch.no_grad():
                    logp = self.model(given, use_cache=False).logits[0].float().log_softmax(-1)
                plain.append(sum(float(logp[len(prompt) - 1 + i, t]) for i, t in enumerate(text)))
            packed = self._path_scores(head, [row])
        except Exception as error:  # whatever an architecture raises on what it does not know
            raise self._cannot(first_line(error)) from error
        noise = 1e-3 if self.model.dtype == torch.float32 else 0.03  # nats a token
        if not np.allclose(packed, plain, rtol=0, atol=noise * len(ids)):
            raise self._cannot("it does not read packed texts as it reads them one at a time")
        return head

    def _cannot(self, why: str) -> JudgeError:
        kind = getattr(self.model.config, "model_type", "this architecture")
        return JudgeError(
            f"the model {self._source} ({kind}) cannot judge by log-probabilities here: {why}; "
            f"choose another autointerp.model, or serve it and set autointerp.judge to http"
        )

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(embedded.snapshot(self._source))

    def _evidence(self, pairs: set[tuple[str, str]]) -> dict[tuple[str, str], float]:
        """log p(text | explanation) - log p(text) of (explanation, text) pairs."""
        new = {("", text) for _, text in pairs} - self._plain.keys()
        scores = self._log_likelihoods(sorted(pairs | new))
        # The same segments come up under many features, so what they are worth alone is kept.
        self._plain |= {pair: scores[pair] for pair in new}
        scores |= self._plain
        return {pair: round(scores[pair] - scores["", pair[1]], 3) for pair in pairs}

    def _log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], float]:
        """log p(text | explanation) in nats of sorted pairs; what prompts and texts begin with in
        common is read once."""
        rows: list[_Tree] = []
        for explanation, group in itertools.groupby(pairs, itemgetter(0)):
            prompt = self._prompt(explanation or "any text")
            rows.append(_Tree(explanation, prompt))
            for ids, text in sorted((self._ids(one_line(text)), text) for _, text in group):
                if len(rows[-1]) + len(ids) > _ROW_TOKENS and rows[-1].paths:
                    rows.append(_Tree(explanation, prompt))
                rows[-1].add(text, ids)
        rows.sort(key=len)
        scores: dict[tuple[str, str], float] = {}
        while rows:
            batch = max(1, self._batch_tokens // len(rows[-1]))
            part, rows = rows[-batch:], rows[:-batch]  # rows of similar length, the longest first
            asked = [(row.explanation, text) for row in part for text, _ in row.paths]
            scores |= dict(zip(asked, self._path_scores(self._head, part), strict=True))
        return scores

    def _path_scores(self, head: Head, rows: Sequence[_Tree]) -> list[float]:
        """log p of every text of some rows, in their order."""
        device = self.model.device
        ids = pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True)
        # A token sees itself and what its own path holds; padding sees itself.
        sees = torch.eye(ids.shape[1], dtype=torch.bool).repeat(len(rows), 1, 1)
        for row, seen in zip(rows, sees.numpy(), strict=True):
            for token, parent in enumerate(row.parents[1:], 1):
                seen[token] |= seen[parent]
        mask = torch.zeros(sees.shape, dtype=self.model.dtype)
        mask.masked_fill_(~sees, torch.finfo(mask.dtype).min)
        read = [(r, k) for r, row in enumerate(rows) for k in range(row.prompt, len(row))]
        before = [rows[r].parents[k] for r, k in read]
        targets = torch.tensor([rows[r].ids[k] for r, k in read], device=device)
        final: list[torch.Tensor] = []

        def keep_last(module: Any, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            final.append(given[0])
            return (given[0][:, -1:],)  # the model makes logits of this one, `head` of the others

        with (
            torch.no_grad(),
            self.model.get_output_embeddings().register_forward_pre_hook(keep_last),
        ):
            last = self.model(
                input_ids=ids.to(device), attention_mask=mask[:, None].to(device),
                position_ids=(sees.sum(2) - 1).to(device), use_cache=False,
            ).logits  # fmt: skip
        with torch.no_grad():
            (hidden,) = final
            head.check(hidden[:, -1:], last)
            parts = head.blocks(hidden[[r for r, _ in read], before], last.shape[-1])
            logps = []
            for part, t in zip(parts, targets.split(len(parts[0])), strict=True):
                logits = head(part)
                logps.append(logits.gather(1, t[:, None])[:, 0] - logits.logsumexp(1))
            logp = torch.cat(logps).cpu().double().numpy()
        scores, start = [], 0
        for row in rows:
            scores += [float(logp[[start + k for k in path]].sum()) for _, path in row.paths]
            start += len(row) - row.prompt
        return scores

    def _generate(self, chats: Sequence[list[dict[str, str]]]) -> Iterator[str]:
        """Greedy answers to chats, in the model's own form, some at a time."""
        tokenizer = self.tokenizer
        tokenizer.padding_side = "left"
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        for start in range(0, len(chats), _GENERATED_AT_ONCE):
            given = tokenizer.apply_chat_template(
                list(chats[start : start + _GENERATED_AT_ONCE]),
                add_generation_prompt=True,
                padding=True,
                return_tensors="pt",
                return_dict=True,
            )
            with torch.no_grad():
                out = self.model.generate(
                    **given.to(self.model.device), do_sample=False, max_new_tokens=24,
                    pad_token_id=tokenizer.pad_token_id,
                )  # fmt: skip
            new = out[:, given["input_ids"].shape[1] :]
            answers = tokenizer.batch_decode(new, skip_special_tokens=True)
            yield from (text.strip() for text in answers)

    def _prompt(self, explanation: str) -> list[int]:
        """What comes before a text, in the form that the model was trained on."""
        tokenizer, words = self.tokenizer, f"Words to look for: {explanation}."
        if tokenizer.chat_template:
            asked = [{"role": "user", "content": f"{words} Write a text with them."}]
            given = tokenizer.apply_chat_template(
                asked, add_generation_prompt=True, return_dict=True
            )
            ids: list[int] = given["input_ids"]
        else:
            ids = tokenizer(f"{words}\nText:\n")["input_ids"]
        return ids

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


_BLOCK_QUESTIONS = 2048
_GENERATED_AT_ONCE = 32
_ROW_TOKENS = 320  # every token of a row is compared with every other


class _Tree:
    """One row of ids: a prompt, and texts that continue it, what they begin with in common once.

    parents: of each token, the token before it in its text.
    paths: of each text, its tokens as places after the prompt.
    """

    def __init__(self, explanation: str, prompt: Sequence[int]) -> None:
        self.explanation, self.prompt = explanation, len(prompt)
        self.ids, self.parents = list(prompt), list(range(-1, len(prompt) - 1))
        self.paths: list[tuple[str, list[int]]] = []
        self._after: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, text: str, ids: Sequence[int]) -> None:
        """One more text."""
        parent, path = self.prompt - 1, []
        for token in ids:
            place = self._after.setdefault((parent, token), len(self))
            if place == len(self):
                self.ids.append(token)
                self.parents.append(parent)
            path.append(place - self.prompt)
            parent = place
        self.paths.append((text, path))
