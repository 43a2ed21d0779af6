"""From noise to latents: schedules, samplers, guidance and noise, as functions on plain tensors."""
