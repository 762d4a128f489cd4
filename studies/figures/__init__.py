"""Figures of studies: of sweeps of 2-D runs, of bi-level training, of spectra of linear VAEs and of an audit."""
