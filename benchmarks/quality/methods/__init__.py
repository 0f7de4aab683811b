"""Fine-tuning methods that DCFT is compared with."""
