from .api import load as load, save as save
from .jobs.apply import apply as apply
from .jobs.check import check as check
from .jobs.convert import convert as convert
from .jobs.data import write_data as write_data
from .jobs.evaluate import evaluate as evaluate
from .jobs.expert_sets import expert_sets as expert_sets
from .jobs.export import export as export
from .jobs.families import families as families
from .jobs.fit import fit as fit
from .jobs.generate import generate as generate
from .jobs.heal import heal as heal
from .jobs.merge import merge as merge
from .jobs.place import place as place
from .jobs.pretrain_tiny import pretrain_tiny as pretrain_tiny
from .jobs.profile import profile as profile
from .jobs.prune import prune as prune
from .jobs.quantize import quantize as quantize
from .jobs.report import write_report as write_report
from .jobs.route import route as route
from .jobs.slim import slim as slim
from .jobs.sparsify import sparsify as sparsify
from .jobs.super_experts import super_experts as super_experts
from .jobs.train import train as train

__version__: str
