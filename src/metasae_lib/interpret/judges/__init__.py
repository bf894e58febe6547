"""Judges: who explains features and answers questions about them, behind one small interface.

- `lexical`: no model; an explanation is token statistics. The floor for every other judge.
- `embedding`: a sentence encoder in this process, by how near texts come to explanations.
- `in_process`: a small transformers model in this process, by log-probabilities.
- `http`: any OpenAI-compatible server, such as vLLM with the paper's judge.
"""
