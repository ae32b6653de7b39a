"""Hugging Face weights in and out, and a resumable torch AdamW."""
