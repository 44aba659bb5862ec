"""What a run has made, in the hands of its user: light curves, spectra, tables."""

from spxdask.results.detrended import Detrended
from spxdask.results.light_curve import LightCurve
from spxdask.results.run import Run, open_run
from spxdask.results.spectrum import Spectrum

__all__ = ["Detrended", "LightCurve", "Run", "Spectrum", "open_run"]
