"""A tokenizer of letters, and a model that can only answer from what its cache gives back."""

import re
from types import SimpleNamespace

import torch
from transformers import LlamaConfig

END = 0


class LetterTokenizer:
    """One token per character; a double line break is one token, so texts do not simply concatenate."""

    eos_token_id = END

    def __init__(self, appends_end=False):
        self.appends_end = appends_end

    def encode(self, text):
        ids = [1 if part == "\n\n" else ord(part) for part in re.findall(r"\n\n|.|\n", text)]
        return [*ids, END] if self.appends_end else ids

    def decode(self, ids, skip_special_tokens=False):
        return "".join("\n\n" if i == 1 else chr(i) for i in ids if not (skip_special_tokens and i == END))


class LookupModel:
    """Keeps token ids as keys, reads them back from the cache, and continues the text from them alone."""

    device = torch.device("cpu")

    def __init__(self):
        self.config = LlamaConfig(
            num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=1, hidden_size=1
        )
        self.passes = []

    def forward(self, input_ids, past_key_values, use_cache):
        self.passes.append((past_key_values.get_seq_length(), input_ids.shape[1]))
        new = input_ids[:, None, :, None].float()
        keys, _ = past_key_values.update(new, new.clone(), 0)
        text = LetterTokenizer().decode([int(i) for i in keys[0, 0, :, 0]])
        logits = torch.zeros(1, input_ids.shape[1], 256)
        logits[0, -1, ord(self.next_letter(text))] = 1
        return SimpleNamespace(logits=logits)

    __call__ = forward

    @staticmethod
    def next_letter(text):
        asked = re.findall(r"\nAnswer: The secret code for (.+?) is(.*)", text)
        if not asked:
            return "?"
        name, given = asked[-1]
        document = text[: text.rindex("\nAnswer")]
        fact = re.search(rf"The secret code for {re.escape(name)} is (\d+\.)", document)
        answer = f" {fact[1] if fact else '999999.'}\n"
        return answer[len(given)]
