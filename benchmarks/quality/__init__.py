"""Learning quality: DCFT and other fine-tuning methods on real tasks, with stored results."""
