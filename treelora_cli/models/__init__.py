"""Backbones, their LoRA adapters, and the way from text to tokens and back."""
