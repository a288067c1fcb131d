"""LoRA adapters in the unified model: of live PEFT models, and from folders that PEFT saved."""
