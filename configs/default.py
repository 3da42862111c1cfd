"""Every field of a run, with its default: the paper's CIFAR-10 recipe.

Mo et al., "When Adversarial Training Meets Vision Transformers", NeurIPS 2022 (arXiv 2210.07540).
A recipe is this file plus a few overrides; a flag such as ``--config.threat.eps=0.0157`` overrides
any field of either. Sizes of perturbations are in pixel units of images in [0, 1]. Durations are in
epochs unless the name says otherwise. 'vit-at train RECIPE --help' shows these comments, so each
must be understood alone; where 0 or '' stands for a derived value, it says so.
"""

from ml_collections import ConfigDict

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def get_config() -> ConfigDict:
    """Returns the default configuration, locked: unknown fields are refused."""
    config = ConfigDict()
    config.name = "default"  # names the work directory runs/<name>
    config.seed = 0  # of everything random: weights, data order, augmentation, masks, attacks
    config.dtype = "auto"  # of matrix products in training; auto: bfloat16 on TPU/GPU, else float32
    config.sharding = "replicated"  # of the training state: whole on each device, or fsdp: split
    config.objective = "at"  # natural, at, trades or mart
    config.beta = 6.0  # weight of the robust term of TRADES and MART
    config.label_smoothing = 0.0  # mass moved from the label to all classes, in [0, 1)
    config.epochs = 40  # passes over the training split
    config.batch_size = 64  # images per update, over all devices
    config.accumulate_steps = 1  # micro-batches per update; the result does not depend on it
    config.phases = ""  # what changes when: '0 threat.steps=1; 20 threat.steps=2 threat.eps=8/255'
    config.ema_decay = 0.0  # of the averaged weights that are evaluated; 0: no averaging
    config.swa_epochs = 0.0  # the weights of these last epochs are averaged equally; 0: none
    config.log_every_steps = 10  # steps between two lines of metrics.jsonl

    config.model = model = ConfigDict()  # the network, and the weights that it starts from
    model.name = "vit_base_patch16_224"  # timm's name; 'vit-at models' lists them
    model.patch_size = 4  # side of a patch in pixels; 0: the one in the name
    model.stem = "patch"  # before the blocks: patch (one linear map), or conv (3x3 convolutions)
    model.embed_dim = 0  # width of a token; 0: the architecture's
    model.depth = 0  # number of blocks; 0: the architecture's
    model.num_heads = 0  # attention heads of a block; 0: the architecture's
    model.mlp_ratio = 0.0  # hidden width of the MLP / embed_dim; 0: the architecture's
    model.qk_scale = 0.0  # of the attention logits; 0: head_dim ** -0.5
    model.drop_path = 0.0  # stochastic depth; 0: the architecture's (Swin: 0.1); 1e-9: none
    model.remat = False  # a gradient computes blocks again instead of keeping them: less memory
    model.fused_attention = True  # by one kernel, in bfloat16 on TPUs and on GPUs since Ampere
    model.pretrained = ""  # weights to start from: a file, hf:NAME or work directory; '': scratch
    model.allow_few_tokens = False  # permit a patch that leaves fewer than 16 tokens

    config.data = data = ConfigDict()  # images and their augmentation
    data.name = "cifar10"  # digits, a TFDS name, folder:PATH of PATH/<split>/<class>/, or npy:FILE
    data.dir = ""  # of TFDS, or of a relative folder; '': $TFDS_DATA_DIR or ~/tensorflow_datasets
    data.train_split = "train"  # TFDS split to train on, such as train or train[:1000]
    data.test_split = "test"  # TFDS split of the evaluation at the end
    data.allow_overlap = False  # permit test images that are training images too
    data.from_images = ""  # taken from the images: image_size, normalisation, splits; '': nothing
    data.stratified = False  # hold-out, and a folder's slices, have all classes in proportion
    data.validation_examples = 1000  # held out of the training split to choose the best checkpoint
    data.image_size = 32  # side of the square that the model sees, in pixels
    data.transform = "squash"  # how images are made square; or resizeN-cropM[-bicubic]
    data.mean = CIFAR_MEAN  # per channel, in pixel units; as many channels are fed to the model
    data.std = CIFAR_STD  # per channel, in pixel units
    data.crop_padding = 4  # black pixels around an image before the random crop; 0: no crop
    data.flip = True  # random horizontal flip
    data.augment = ""  # comma-separated, after crop and flip: randaugment-2-9, random-erasing, ...
    data.cache_gib = 4.0  # decoded sets up to this size stay in memory, larger ones are streamed
    data.decoded_dir = ""  # where larger sets are decoded to, once; '': decoded in each epoch
    data.threads = 0  # that read and decode; 0: one per core

    data.extra = extra = ConfigDict()  # a second source that every batch holds images of
    extra.name = ""  # 'npz:FILE' of images and labels, or as data.name; '': none
    extra.split = "train"  # of a source that has splits
    extra.fraction = 0.0  # share of a batch, such as 0.7

    config.mixing = mixing = ConfigDict()  # mixup and CutMix before the attack; natural, AT only
    mixing.probability = 0.3  # that a batch is mixed at all
    mixing.mixup_alpha = 0.8  # Beta(alpha, alpha) of mixup; 0: never
    mixing.cutmix_alpha = 1.0  # Beta(alpha, alpha) of CutMix; 0: never
    mixing.cutmix_probability = 0.5  # that a mixed batch uses CutMix, where both are on

    config.threat = threat = ConfigDict()  # the training attack
    threat.method = "pgd"  # pgd, or apgd: keeps the worst point, and chooses the step size itself
    threat.norm = "linf"  # linf, l2 or l1
    threat.eps = 8 / 255  # radius of the ball
    threat.step_size = 2 / 255  # of one step of PGD
    threat.steps = 10  # of the training attack
    threat.start = "random"  # random (TRADES, MART: tiny), zero, or noise (N-FGSM, not projected)
    threat.also = ""  # further balls, as NORM:EPS:STEP_SIZE, such as 'l2:0.5:0.125,l1:12:1'
    threat.combine = "max"  # of several balls: the worst for each image, or avg: the mean over all
    threat.eps_warmup_epochs = 0.0  # eps and step size grow linearly from 0 over these

    config.awp = weights = ConfigDict()  # adversarial weight perturbation (Wu et al. 2020)
    weights.gamma = 0.0  # its size, as a share of each weight's norm, such as 0.005; 0: off
    weights.warmup_epochs = 0.0  # epochs before it begins

    config.masking = masking = ConfigDict()  # ARD and PRM, the paper's two methods
    masking.ard = False  # attention random dropping
    masking.prm = False  # perturbation random masking
    masking.warmup_epochs = 10.0  # over which the keep probability grows from 0 to keep_max
    masking.keep_max = 1.0  # keep probability after the warm-up
    masking.patch_size = 0  # side of PRM's patches in pixels; 0: the model's

    config.optimizer = optimizer = ConfigDict()  # the update of the weights
    optimizer.name = "sgd"  # sgd, adamw or muon
    optimizer.learning_rate = 0.1  # at its peak
    optimizer.momentum = 0.9  # of SGD and Muon, which suits 0.95
    optimizer.b1 = 0.9  # of Adam: decay of the mean gradient
    optimizer.b2 = 0.999  # of Adam: decay of the mean squared gradient
    optimizer.weight_decay = 1e-4  # on all parameters
    optimizer.layer_decay = 1.0  # factor on the rate from a layer to the one below; 1: one rate
    optimizer.clip_norm = 1.0  # global gradient norm, before weight decay; 0: no clipping
    optimizer.schedule = "step"  # step, cosine, cyclic or constant
    optimizer.drop_before_end = (5.0, 2.0)  # step: the rate falls this many epochs before the end
    optimizer.drop_factor = 0.1  # step: by this factor each time
    optimizer.warmup_epochs = 0.0  # linear warm-up from 0; cyclic: where the peak is

    config.eval = evaluation = ConfigDict()  # what is measured, when and on what
    evaluation.every_epochs = 1  # between robust validations, also at the end; 0: never
    evaluation.validation_attack = "pgd-10"  # what validation runs beside clean accuracy
    evaluation.stop_if_overfitted = False  # end where robust validation halves: keep the best
    evaluation.attacks = "clean,cw-20,pgd-20,pgd-100,autoattack"  # on the test split at the end
    evaluation.num_examples = 0  # test images used; 0: all
    evaluation.batch_size = 256  # over all devices
    evaluation.checkpoint = "best"  # which weights are tested: best (on validation) or last
    evaluation.precision = "float32"  # of products; on NVIDIA GPUs also bf16x9, bf16x6, tf32x3
    evaluation.weights = ""  # raw, ema or swa; '': averaged ones where there are any
    evaluation.threat = ball = ConfigDict()  # the attacks' ball; '' and 0: as in training
    ball.norm = ""  # linf, l2 or l1; if not that of training, set eps and step_size too
    ball.eps = 0.0  # radius of the ball
    ball.step_size = 0.0  # of PGD and CW; 0: as in training, but at most a quarter of eps

    config.checkpoint = checkpoint = ConfigDict()  # when the state is saved
    checkpoint.every_minutes = 10.0  # between checkpoints within an epoch; 0: none by the clock
    checkpoint.every_steps = 0  # between checkpoints within an epoch; 0: none by steps
    checkpoint.keep = 2  # checkpoints kept beside the best one
    return config.lock()
