"""Models and tokenizers of Hugging Face transformers: finding, checking and loading them."""
