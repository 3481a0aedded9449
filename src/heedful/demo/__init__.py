"""A real trained diffusion model, small enough to live in the package: handwritten digits."""
