"""What a run is worth: report.html and report.json in its output folder."""
