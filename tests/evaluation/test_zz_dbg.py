import sys; sys.path.insert(0,"/work/main/tests/evaluation")
from test_inception import *
def test_x(network, images, ours, real, folder):
    o,m=forward(network,images)
    print("maps",np.abs(m.numpy()-spatial(ours.maps)).max(), np.abs(m.numpy()).max(), m.std())
    print("feat",np.abs(o["2048"].numpy()-ours.features).max(), ours.features.std(0).mean(), ours.features.max())
    print("logit",np.abs(o["logits_unbiased"].numpy()-ours.logits).max(), ours.logits.std(0).mean(), np.abs(ours.logits).max())
    # resize
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as f
    r=(f(images.float(),size=(299,299),align_corners=False)-128)/128
    print("resize",(r-stretched(images)).abs().max())
    a=frechet(spatial(ours.maps),spatial(real.maps)); b=frechet_of_few(spatial(ours.maps),spatial(real.maps)); print(a,b,a/b-1)
    c=frechet_of_few(m.double().numpy(),spatial(real.maps)); print("c",c/b-1)
    from qdiff.evaluation.gaussians import Gaussian, frechet_distance
    print("eig", frechet_distance(Gaussian.of(m.numpy()),load_reference(folder/"adm.npz").spatial)/c-1)
    for w in ((spatial(ours.maps, 8), spatial(real.maps, 8)),(spatial(ours.maps[:, 7:]), spatial(real.maps[:, 7:])),(spatial(ours.before), spatial(real.before)),(spatial(ours.maps)[1:], spatial(real.maps)),(spatial(ours.maps),torchs_order(real.maps))): print(frechet_of_few(*w)/b-1)
    fa=frechet_of_few(ours.features,real.features); print("fid",fa, frechet_of_few(o["2048"].double().numpy(),real.features)/fa-1, frechet_distance(Gaussian.of(o["2048"].numpy()),load_reference(folder/"adm.npz").gaussian)/fa-1)
