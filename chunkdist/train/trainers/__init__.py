"""TRL's `SFTTrainer`, checked, on token streams, as a pipeline, with smaller chunks when memory runs out."""
