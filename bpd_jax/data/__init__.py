"""Corpora, tasks and batches; nothing here imports TensorFlow unless it says so."""
