"""What publishes: tables of studies, packs, spectrum, gradient noise, scale of the latents, audit. Training never imports it."""
