"""Load an export with plain transformers: python examples/load_export.py FOLDER [PROMPT]."""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: str, prompt: str = "The people of the United States") -> str:
    """Continue a prompt with the compressed model."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
