"""Training: a procedural world, losses and loops, and the tiny model that ltxlite ships.

world: captions and what they mean.  scene: their pictures and sounds.  measure: what clips show.
recipe: sizes and schedules of the shipped model.  differentiable: networks under gradients.
loop: steps, checkpoints, resuming.  video_vae, audio_vae, vocoder, upscaler, transformer: one
loop each.  data: clips with captions, ours or a user's.  export: the release layout and its GGUF.
"""
