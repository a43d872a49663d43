"""Every built-in model of an adapted type, name by name against transformers' own model on the meta device."""
