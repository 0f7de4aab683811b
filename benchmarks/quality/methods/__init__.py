"""Fine-tuning methods that DCFT is compared with, each small and checked against its equation."""
