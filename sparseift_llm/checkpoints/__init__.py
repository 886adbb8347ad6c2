"""Saving and loading sparse models: masks on disk, the hook in transformers, Trainer folders, exports, model cards."""
