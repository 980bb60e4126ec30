"""treelora: continual learning of large pre-trained models with LoRA, on the command line."""

__version__ = "0.1.0"
