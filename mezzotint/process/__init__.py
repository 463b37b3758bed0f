"""What a network was trained under: levels of noise, schedules, objectives, loss weighting."""

from mezzotint.process import prediction, schedules, weighting
from mezzotint.process.level import CLEAN, Level
from mezzotint.process.prediction import Estimate, Prediction
from mezzotint.process.process import Process
from mezzotint.process.schedules import Discrete, RectifiedFlow, Schedule

__all__ = [
    "CLEAN",
    "Discrete",
    "Estimate",
    "Level",
    "Prediction",
    "Process",
    "RectifiedFlow",
    "Schedule",
    "prediction",
    "schedules",
    "weighting",
]
