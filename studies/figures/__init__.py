"""Figures of studies: of sweeps of 2-D runs, of bi-level training and of spectra of linear VAEs."""
