"""What a run will need, by arithmetic on configs and headers alone: no model, no data, no torch."""
