"""Figures by family; each is a function figure(runs, save) of run folders or packs, drawn from arrays alone."""
